"""Kinds of one's own for sidestack: each is one module here and one entry point in `pyproject.toml`."""
