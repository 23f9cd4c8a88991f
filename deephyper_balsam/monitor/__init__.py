"""What a person sees of a search; it only reads."""
