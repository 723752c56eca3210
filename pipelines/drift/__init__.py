"""Drift of data, encoders and SIDs from one retraining cycle to the next."""
