"""Balsam's launcher as this project starts it inside an allocation."""
