"""Tuning: the same grid of settings for every arm, compared on validation dates."""
