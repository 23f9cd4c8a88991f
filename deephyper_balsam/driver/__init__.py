"""The search driver: one loop, and the sessions that evaluate what it asks for."""
