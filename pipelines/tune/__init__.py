"""Tuning: the same settings for every arm, held against each other on validation dates."""
