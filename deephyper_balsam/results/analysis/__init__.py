"""What searches found, to look at: importances, figures, the report, a comparison. No Balsam needed."""
