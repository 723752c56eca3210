"""Experiments over many runs: the papers' tables, the sweep of SIDs, the tuning of arms. No stage depends on them."""
