"""Configuration of the embeddings that Complete Journey is given beside its texts."""

from pydantic import PositiveInt

from sidestack.infra.config import Config, Seed


class BehaviourConfig(Config):
    """The behavioural embedding: which items share baskets, before the events begin."""

    dim: PositiveInt = 64
    """Dimensions kept of the truncated SVD."""
    min_baskets: PositiveInt = 10
    """Items in fewer baskets of these weeks have no behavioural embedding (null)."""
    seed: Seed = 0
    """Seed of the SVD's start block."""


class OrganicConfig(Config):
    """User embeddings of organic activity: purchases of what was not promoted, before the events begin."""

    in_events: bool = False
    """Whether the events tell of organic purchases too. If not, history and household features are of a household's
    promoted purchases alone: the ranker knows its own surface, and of the other one what the embeddings say."""
    newest: PositiveInt = 10
    """Newest organic purchases of a user whose texts are averaged: the sparse activity."""
    dim: PositiveInt = 64
    """Dimensions kept of the truncated SVD: the direct behavioural embedding."""
    min_baskets: PositiveInt = 10
    """Items in fewer organic baskets are left out of the behavioural embedding."""
    seed: Seed = 0
    """Seed of the SVD's start block."""
