"""Checks of a raw log before training: its content, its faults, and the expected cost of a run."""
