"""Submit and collect: where trials run."""
