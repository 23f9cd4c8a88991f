"""The space that is searched: hyperparameters, configurations, and their matrices."""
