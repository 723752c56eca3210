"""Serving of a trained ranker: a user, a history, candidates in; probabilities out. Nothing here needs torchrec."""
