"""A Balsam of one's own: PostgreSQL, the API server, and patches of Balsam's server."""
