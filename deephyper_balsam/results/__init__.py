"""The table of a search, its files, and what is made of them."""
