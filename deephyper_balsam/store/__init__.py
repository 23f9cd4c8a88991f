"""Everything of a search that stands in Balsam."""
