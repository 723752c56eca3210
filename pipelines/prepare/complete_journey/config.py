"""Configuration of the embeddings of Complete Journey other than its text embeddings."""

from pydantic import PositiveInt

from sidestack.infra.config import Config, Seed


class BehaviourConfig(Config):
    """The behavioural embedding: which items share baskets, before the events begin."""

    dim: PositiveInt = 64
    """Dimensions kept of the truncated SVD."""
    min_baskets: PositiveInt = 10
    """Items in fewer baskets before the events have no behavioural embedding (null)."""
    seed: Seed = 0
    """Seed of the SVD's start block."""


class OrganicConfig(Config):
    """User embeddings of organic activity: purchases of products that were not promoted, before the events begin."""

    in_events: bool = False
    """Whether events use organic purchases too. If not, history and household features are of a household's promoted
    purchases only: the ranker sees its own surface, and the organic one only through the embeddings."""
    newest: PositiveInt = 10
    """Number of a user's newest organic purchases whose text embeddings are averaged: the sparse activity."""
    dim: PositiveInt = 64
    """Dimensions kept of the truncated SVD: the direct behavioural embedding."""
    min_baskets: PositiveInt = 10
    """Items in fewer organic baskets are left out of the behavioural embedding."""
    seed: Seed = 0
    """Seed of the SVD's start block."""
