"""Kinds for sidestack, each a file here and a line in pyproject.toml."""
