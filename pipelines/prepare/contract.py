"""What every data source is: settings that open it, and a log that says what it holds and how its rows are made."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from sidestack.infra.config import Config, Day, digest
from sidestack.infra.remote.fields import LocalPath
from sidestack.infra.stage import StageRun
from sidestack.infra.tables import DatasetSpec, Entity

LEDGER = "sources.json"
"""The ledger of source files (`infra.identity`), in the cache directory."""
STORE = "store"
"""The folder of the store, beside the stage's output."""


@dataclass(frozen=True)
class Part:
    """A part of the items or users.

    Attributes:
        origin: where its rows come from, for errors. key: digest of what decides its rows. schema: of its rows.
        chunks: makes them.
    """

    origin: str
    key: str
    schema: pa.Schema
    chunks: Callable[[], Iterable[pa.Table]]


class Source(Protocol):
    """A log: what it holds, and how its rows are made."""

    @property
    def spec(self) -> DatasetSpec:
        """The dataset that it becomes."""

    def parts(self, entity: Entity) -> Sequence[Part]:
        """Return the parts of the items or users, in order."""

    def days(self) -> Sequence[date]:
        """Return the dates that have events, ascending."""

    def day_keys(self, day: date) -> Mapping[str, str]:
        """Return, for requests, events and labels, a digest of what decides a date's rows."""

    def rows(self, days: Sequence[date]) -> Iterator[tuple[date, Iterable[pa.Table]]]:
        """Yield some of the dates, each with its rows in chunks, joined: see `infra.store.write_day`."""


class Prepare(Config):
    """What every source is prepared with."""

    as_of: Day | None = None
    """The snapshot knows what happened before this date, and nothing later; by default all the log has."""
    cache_dir: LocalPath = Path(".cache")
    """Where text embeddings are kept between runs, by the digest of texts and model, and the ledger of source files."""

    @property
    def ledger(self) -> Path:
        """The ledger of source files."""
        return self.cache_dir / LEDGER


class SourceConfig(Config):
    """Base of the sources' settings. A subclass is found by its `kind`, a `Literal` of one name."""

    kind: str
    """The name of the source."""

    def paths(self) -> Sequence[Path]:
        """Return the files and folders that it reads; those of URLs are fetched before it is opened or identified."""
        return ()

    @abstractmethod
    def open(self, run: StageRun[Prepare]) -> Source:
        """Open the log. Every rank calls.

        Raises:
            ConfigError: a package or a directory that it needs is not there. DataError: a file breaks the contract.
        """

    @abstractmethod
    def data_identity(self, prepare: Prepare) -> str:
        """Return a digest of what the source reads, for the stage's key: of its files' names, and what identifies each.

        The settings are in the key anyway.

        Raises:
            ConfigError: a package or a key that it needs is not there. DataError: a file cannot be identified.
        """


def as_time(day: date | None) -> datetime | None:
    """Return the moment at which a day begins."""
    return None if day is None else datetime.combine(day, time())


def label_keys(
    events: Mapping[str, Any], followup_days: Mapping[str, float], day: date, end: datetime | None
) -> dict[str, str]:
    """Return the keys of a date's three tables.

    Labels that mature are made again when, and only when, more of them are known: what counts of the log's end is up
    to which time of the date its impressions have been followed up.

    Args:
        events: what decides the requests' and events' rows.
        followup_days: by task, how long after an impression its label is known, if that is before `end`. day: the
            date.
        end: when the log ends, exclusive; None: all labels are known.
    """
    begins = datetime.combine(day, time())
    known: dict[str, Any] = {}
    for task, days in followup_days.items():
        followed_up = timedelta(days=1) if end is None else end - timedelta(days=days) - begins
        part_s = min(max(followed_up, timedelta()), timedelta(days=1)).total_seconds()
        known[task] = {"followup_days": days, "known_s": part_s}
    of_events = digest(events)
    return {"requests": of_events, "events": of_events, "labels": digest({"events": of_events, "known": known})}
