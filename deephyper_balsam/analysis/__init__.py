"""What a search found, to look at: importances, figures, the report, several searches side by side. No Balsam needed."""
