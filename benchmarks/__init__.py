"""Measurements of the project, each a command; their records stand in ``records``."""
