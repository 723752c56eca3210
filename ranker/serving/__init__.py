"""A trained ranker behind a request: a user, a history, candidates in; probabilities out. Nothing needs torchrec."""
