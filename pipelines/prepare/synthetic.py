"""A seeded synthetic log in the tables' contract, at any size and in bounded memory.

Every item belongs to a latent cluster and subcluster. They determine its embeddings and categorical signals and, with
the user's type, the click probability. So content explains clicks, even on items that were never shown before; only an
id can learn the item's own quality. Every draw is a pure function of the seed and its own keys (`hashing`), so any rank
can make any day.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from scipy.special import expit, ndtri

from sidestack.infra.config import Day, Days, Seed, digest, plain
from sidestack.infra.stage import StageRun
from sidestack.infra.tables import DatasetSpec, Entity, TaskSpec, content_schema, flat_schema, item_schema, user_schema
from sidestack.pipelines.prepare.columns import Ragged, days_between, embeddings, nullable, table
from sidestack.pipelines.prepare.contract import Part, Prepare, SourceConfig, label_keys
from sidestack.pipelines.prepare.hashing import below, uniform

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

CHUNK_ROWS = 16_384
"""Rows built at a time; this bounds memory for any sizes."""
NUM_USER_TYPES = 12
NUM_SLOTS = 6
ACTIONS_PER_DAY = 2
"""Organic actions per user and day; they fill the histories."""
TASTE_TRIES = 3
"""An organic action is the best liked of this many random items, so histories reflect the taste."""
DAY_US = 86_400_000_000

# One tag for each kind of draw keeps them independent of each other.
_CLUSTER, _SUBCLUSTER, _QUALITY, _TYPE, _ITEM, _USER, _TIME, _SLOT, _CLICK, _CONVERT = range(10)
_NULL, _SWAP, _SWAPPED, _ACTION_TIME, _ACTION_ITEM, _CENTRE, _TASTE, _OWN, _SEGMENT = range(10, 19)
_VIEW, _USER_OWN, _USER_NULL, _EXCHANGED = range(19, 23)


class Synthetic(SourceConfig):
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
    """Impressions per day."""
    impressions_per_request: PositiveInt = 1
    """Impressions per request; they share user, time and history."""
    embeddings: dict[str, PositiveInt] = {"text_embedding": 32, "behaviour_embedding": 16}
    """Embedding signals of the items: name -> dimensions."""
    exchanged: tuple[str, ...] = ()
    """Those of `embeddings` that are permuted among items at random: each item has the embedding of another one's
    cluster. They look like the others but explain no click: a control."""
    user_embeddings: dict[str, PositiveInt] = {}
    """Embedding signals of the users, from the tastes that decide their clicks: name -> dimensions."""
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
    """Maximum number of the user's newest earlier actions in a row's history."""
    followup_days: Days = 2
    """Days after which a conversion is known; it is null in rows closer to the log's end."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cold_share == 1.0:
            raise ValueError("cold_share must leave items to show in the training days: below 1")
        for name in self.exchanged:
            if name not in self.embeddings:
                raise ValueError(f"exchanged: {name!r} must be one of embeddings ({', '.join(self.embeddings)})")
        columns = {
            "items": ["item_id", "text", *self.embeddings, *self.categoricals],
            "users": ["user_id", "segment", *self.user_embeddings],
        }
        for whose, names in columns.items():
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"signal {twice[0]!r} has the name of another column of the {whose}")
        return self

    def open(self, run: StageRun[Prepare]) -> "SyntheticLog":
        """Return the log, up to the snapshot's time."""
        return SyntheticLog(self, run.config.as_of)

    def data_identity(self, prepare: Prepare) -> str:
        """Return a constant: the settings decide every row."""
        return "made from its settings alone"


def synthetic_spec(config: Synthetic) -> DatasetSpec:
    """Return the spec of the dataset that this configuration makes."""
    split = config.first_day + timedelta(days=config.train_days)
    return DatasetSpec(
        embeddings=config.embeddings,
        categoricals=config.categoricals,
        user_categoricals={"segment": NUM_USER_TYPES},
        user_embeddings=config.user_embeddings,
        num_items=config.num_items,
        num_users=config.num_users,
        tasks={"click": TaskSpec(), "conversion": TaskSpec(given="click")},
        followup_days={"conversion": float(config.followup_days)},
        dense=("item_rank",),
        sparse={"slot": NUM_SLOTS},
        request_dense=("hour_fraction",),
        request_sparse={"weekday": 7},
        max_history=config.max_history,
        train=(config.first_day, split - timedelta(days=1)),
        test=(split, split + timedelta(days=config.test_days - 1)),
        origin=f"synthetic, seed {config.seed}: latent item clusters drive content and clicks",
    )


@dataclass(frozen=True)
class Tastes:
    """Tastes: how much each type of user likes each cluster and subcluster of items (unit normal draws)."""

    cluster_TC: Floats
    subcluster_TCS: Floats

    @classmethod
    def drawn(cls, config: Synthetic) -> "Tastes":
        """Draw the tastes of a seed."""
        rng = np.random.default_rng([config.seed, _TASTE])
        shape = (NUM_USER_TYPES, config.num_clusters)
        return cls(rng.standard_normal(shape), rng.standard_normal((*shape, config.num_subclusters)))


class SyntheticLog:
    """The rows of a synthetic dataset, chunk by chunk: a `pipelines.prepare.contract.Source`.

    Args:
        config: sizes, seed and shares. as_of: the log's end; None: the end of its last day.
    """

    def __init__(self, config: Synthetic, as_of: date | None = None) -> None:
        self.config = config
        self.spec = synthetic_spec(config)
        last = self.spec.test[1] + timedelta(days=1)
        self.end = last if as_of is None else min(as_of, last)
        self._tastes = Tastes.drawn(config)
        self._num_warm = max(1, round(config.num_items * (1.0 - config.cold_share)))

    def parts(self, entity: Entity) -> list[Part]:
        """Return the one part of the items or users."""
        schema = content_schema(self.spec, entity)
        chunks = self.items if entity == "item" else self.users
        return [Part("synthetic", digest({"entity": entity, "log": self._lasting()}), schema, chunks)]

    def days(self) -> list[date]:
        """Return the dates that have events."""
        return [day for day in days_between(self.spec.train[0], self.spec.test[1]) if day < self.end]

    def day_keys(self, day: date) -> dict[str, str]:
        """Return digests for a date's requests, events and labels; see `pipelines.prepare.contract.Source`."""
        log = {"log": self._lasting(), "day": str(day)}
        return label_keys(log, self.spec.followup_days, day, datetime.combine(self.end, time()))

    def _lasting(self) -> dict[str, Any]:
        """Return the settings that decide a row; the log's length is not one of them."""
        return {name: value for name, value in plain(self.config).items() if name not in ("test_days", "followup_days")}

    def cluster(self, items_N: Ints) -> Ints:
        """Return the items' latent clusters, in [0, num_clusters)."""
        return below(self.config.num_clusters, self.config.seed, _CLUSTER, items_N)

    def subcluster(self, items_N: Ints) -> Ints:
        """Return the items' latent subclusters, in [0, num_subclusters)."""
        return below(self.config.num_subclusters, self.config.seed, _SUBCLUSTER, items_N)

    def user_type(self, users_N: Ints) -> Ints:
        """Return the users' latent types, in [0, NUM_USER_TYPES)."""
        return below(NUM_USER_TYPES, self.config.seed, _TYPE, users_N)

    def affinity(self, users_N: Ints, items_N: Ints) -> Floats:
        """Return how much users like items' content: approximately unit normal over random pairs."""
        types_N, clusters_N = self.user_type(users_N), self.cluster(items_N)
        coarse_N = self._tastes.cluster_TC[types_N, clusters_N]
        fine_N = self._tastes.subcluster_TCS[types_N, clusters_N, self.subcluster(items_N)]
        return 0.8 * coarse_N + 0.6 * fine_N

    def click_probability(self, users_N: Ints, items_N: Ints, slots_N: Ints) -> Floats:
        """Return the click probability, from content, the item's own quality, and the slot."""
        quality_N = _normal(self.config.seed, _QUALITY, items_N)
        return np.asarray(expit(-2.0 + 1.3 * self.affinity(users_N, items_N) + 0.5 * quality_N - 0.2 * slots_N))

    def items(self) -> Iterator[pa.Table]:
        """Return the items table in chunks."""
        schema = item_schema(self.spec)
        for items_N in _chunks(self.config.num_items):
            columns: dict[str, Any] = {"item_id": items_N, "text": pa.array(self._texts(items_N))}
            for name, dim in self.config.embeddings.items():
                columns[name] = self._embedding(name, dim, items_N)
            for number, (name, cardinality) in enumerate(self.config.categoricals.items()):
                columns[name] = self._categorical(name, number, cardinality, items_N)
            yield table(columns, schema)

    def users(self) -> Iterator[pa.Table]:
        """Return the users table in chunks; for most users `segment` is the type, and embeddings reflect the taste."""
        schema = user_schema(self.spec)
        for users_N in _chunks(self.config.num_users):
            known_N = uniform(self.config.seed, _SEGMENT, users_N) < 0.7
            segment = nullable(self.user_type(users_N).astype(np.int32), known_N)
            columns: dict[str, Any] = {"user_id": users_N, "segment": segment}
            for name, dim in self.config.user_embeddings.items():
                columns[name] = self._user_embedding(name, dim, users_N)
            yield table(columns, schema)

    def rows(self, days: Sequence[date]) -> Iterator[tuple[date, Iterator[pa.Table]]]:
        """Yield some of the dates, each with its joined impressions in chunks."""
        return ((day, self.impressions(day)) for day in days)

    def impressions(self, day: date) -> Iterator[pa.Table]:
        """Yield a day's joined impressions in chunks, ordered by time."""
        schema = flat_schema(self.spec)
        total = self.config.events_per_day
        for rows_N in _chunks(total):
            yield table(self._columns(day, rows_N, total), schema)

    def _columns(self, day: date, rows_N: Ints, total: int) -> dict[str, Any]:
        seed, number = self.config.seed, day.toordinal()
        # A request is drawn by its first row. Row r lies in the r-th of `total` equal parts of the day: chunks come in
        # order of time.
        first_N = rows_N - rows_N % self.config.impressions_per_request
        of_day_N = (first_N + uniform(seed, _TIME, number, first_N)) / total
        times_N = _midnight(number) + np.floor(of_day_N * DAY_US).astype(np.int64)
        users_N = below(self.config.num_users, seed, _USER, number, first_N)
        items_N = self._shown_items(day, rows_N)
        slots_N = below(NUM_SLOTS, seed, _SLOT, number, rows_N)
        clicks_N = uniform(seed, _CLICK, number, rows_N) < self.click_probability(users_N, items_N, slots_N)
        history, history_times = self._histories(users_N, times_N)
        return {
            "request_id": (number << 32) + first_N,
            "event_time": times_N.astype("datetime64[us]"),
            "user_id": users_N,
            "item_id": items_N,
            "click": clicks_N.astype(np.int8),
            "conversion": self._conversions(number, rows_N, times_N, users_N, items_N, clicks_N),
            "item_rank": np.log1p(items_N).astype(np.float32),
            "hour_fraction": of_day_N.astype(np.float32),
            "slot": Ragged.single(slots_N),
            "weekday": Ragged.single(np.full(len(rows_N), day.weekday())),
            "history_item_ids": history,
            "history_times": history_times,
        }

    def _shown_items(self, day: date, rows_N: Ints) -> Ints:
        """Draw items with more weight on low ids; the last ids are cold: shown on test days only."""
        shown = self._num_warm if day < self.spec.test[0] else self.config.num_items
        skewed_N = uniform(self.config.seed, _ITEM, day.toordinal(), rows_N) ** 1.5
        return np.floor(shown * skewed_N).astype(np.int64)

    def _conversions(
        self,
        number: int,
        rows_N: Ints,
        times_N: Ints,
        users_N: Ints,
        items_N: Ints,
        clicks_N: npt.NDArray[np.bool_],
    ) -> pa.Array:
        chance_N = expit(-1.0 + self.affinity(users_N, items_N))
        converted_N = clicks_N & (uniform(self.config.seed, _CONVERT, number, rows_N) < chance_N)
        log_end = _midnight(self.end.toordinal())
        known_N = times_N + self.config.followup_days * DAY_US < log_end
        return nullable(converted_N.astype(np.int8), known_N)

    def _histories(self, users_N: Ints, times_N: Ints) -> tuple[Ragged, Ragged]:
        """Return the newest `max_history` organic actions before each time, oldest first."""
        days = -(-self.config.max_history // ACTIONS_PER_DAY)
        at_N1 = times_N[:, None] // DAY_US
        back_K = np.repeat(np.arange(days, -1, -1), ACTIONS_PER_DAY)
        turn_K = np.tile(np.arange(ACTIONS_PER_DAY), days + 1)
        # The t-th action of a day lies in the t-th part of it, so actions are in order of time.
        part_NK = uniform(self.config.seed, _ACTION_TIME, users_N[:, None], at_N1 - back_K, turn_K)
        acted_NK = (at_N1 - back_K) * DAY_US + np.floor((turn_K + part_NK) * (DAY_US // ACTIONS_PER_DAY)).astype(
            np.int64
        )
        before_NK = acted_NK < times_N[:, None]
        newer_NK = np.cumsum(before_NK[:, ::-1], axis=1)[:, ::-1]
        keep_NK = before_NK & (newer_NK <= self.config.max_history)
        who_NK = np.broadcast_to(users_N[:, None], keep_NK.shape)
        when = Ragged.masked(acted_NK, keep_NK)
        liked = self._liked_items(who_NK[keep_NK], when.values)
        return Ragged(liked, when.offsets_N1), Ragged(when.values.astype("datetime64[us]"), when.offsets_N1)

    def _liked_items(self, users_M: Ints, times_M: Ints) -> Ints:
        tries_MT = below(
            self._num_warm, self.config.seed, _ACTION_ITEM, users_M[:, None], times_M[:, None],
            np.arange(TASTE_TRIES),
        )  # fmt: skip
        who_MT = np.broadcast_to(users_M[:, None], tries_MT.shape)
        best_M = self.affinity(who_MT, tries_MT).argmax(axis=1)
        liked_M: Ints = tries_MT[np.arange(len(tries_MT)), best_M]
        return liked_M

    def _texts(self, items_N: Ints) -> list[str]:
        pairs = zip(items_N, self.cluster(items_N), self.subcluster(items_N), strict=True)
        return [f"item {item} of cluster {coarse}.{fine}" for item, coarse, fine in pairs]

    def _embedding(self, name: str, dim: int, items_N: Ints) -> pa.Array:
        config, tag = self.config, _tag(name)
        rng = np.random.default_rng([config.seed, _CENTRE, tag])
        centres_CD = rng.standard_normal((config.num_clusters, dim))
        fine_CSD = rng.standard_normal((config.num_clusters, config.num_subclusters, dim))
        sources_N = items_N
        if name in config.exchanged:
            sources_N = below(config.num_items, config.seed, _EXCHANGED, tag, items_N)
        clusters_N, subclusters_N = self.cluster(sources_N), self.subcluster(sources_N)
        own_ND = _normal(config.seed, _OWN, tag, items_N[:, None], np.arange(dim))
        vectors_ND = 0.8 * centres_CD[clusters_N] + 0.6 * fine_CSD[clusters_N, subclusters_N] + config.noise * own_ND
        return embeddings(_at_unit_length(vectors_ND), self._present(tag, items_N))

    def _user_embedding(self, name: str, dim: int, users_N: Ints) -> pa.Array:
        """Return a random projection of the users' tastes for clusters, plus noise per user."""
        config, tag = self.config, _tag(name)
        rng = np.random.default_rng([config.seed, _VIEW, tag])
        view_CD = rng.standard_normal((config.num_clusters, dim)) / np.sqrt(config.num_clusters)
        own_ND = _normal(config.seed, _USER_OWN, tag, users_N[:, None], np.arange(dim))
        vectors_ND = (self._tastes.cluster_TC @ view_CD)[self.user_type(users_N)] + config.noise * own_ND
        present_N = uniform(config.seed, _USER_NULL, tag, users_N) >= config.null_share
        return embeddings(_at_unit_length(vectors_ND), present_N)

    def _categorical(self, name: str, number: int, cardinality: int, items_N: Ints) -> pa.Array:
        """Return a signal that follows the cluster (every second signal: the subcluster); 1 value in 10 is random."""
        config, tag = self.config, _tag(name)
        latent_N = self.cluster(items_N)
        if number % 2:
            latent_N = latent_N * config.num_subclusters + self.subcluster(items_N)
        random_N = below(cardinality, config.seed, _SWAPPED, tag, items_N)
        is_random_N = uniform(config.seed, _SWAP, tag, items_N) < 0.1
        ids_N = np.where(is_random_N, random_N, latent_N % cardinality).astype(np.int32)
        return nullable(ids_N, self._present(tag, items_N))

    def _present(self, tag: int, items_N: Ints) -> npt.NDArray[np.bool_]:
        return uniform(self.config.seed, _NULL, tag, items_N) >= self.config.null_share


def _chunks(total: int) -> Iterator[Ints]:
    for start in range(0, total, CHUNK_ROWS):
        yield np.arange(start, min(start + CHUNK_ROWS, total))


def _midnight(ordinal: int) -> int:
    return (ordinal - date(1970, 1, 1).toordinal()) * DAY_US


def _tag(name: str) -> int:
    return zlib.crc32(name.encode())


def _at_unit_length(vectors_ND: Floats) -> npt.NDArray[np.float16]:
    unit_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.asarray(unit_ND, np.float16)


def _normal(*keys: int | Ints) -> Floats:
    # 2^-54 is half a step of `uniform`: the quantile function never sees 0.
    return np.asarray(ndtri(uniform(*keys) + 2.0**-54))
