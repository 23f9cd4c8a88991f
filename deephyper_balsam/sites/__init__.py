"""Site configs, the classes they name, and the embedded local server."""
