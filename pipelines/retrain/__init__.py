"""Recurring retraining: cycles that follow a growing log, gates, promotion and roll-back (SIDE paper, 5.1)."""
