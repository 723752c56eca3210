"""Recurring retraining: cycles over a growing log, gates, promotion and roll-back (SIDE paper, 5.1)."""
