"""The interface of data sources: settings that open a log, and the log with its spec, keys and rows."""

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

IDENTITY_CACHE = "sources.json"
"""The identities of source files (`infra.identity`), in the cache directory."""
STORE = "store"
"""The folder of the store, next to the stage's output."""


@dataclass(frozen=True)
class Part:
    """A part of the items or users.

    Attributes:
        origin: where its rows come from, for error messages. key: digest of all that decides its rows. schema: of its
            rows.
        chunks: yields the rows.
    """

    origin: str
    key: str
    schema: pa.Schema
    chunks: Callable[[], Iterable[pa.Table]]


class Source(Protocol):
    """An open log: its spec, keys and rows."""

    @property
    def spec(self) -> DatasetSpec:
        """Spec of the dataset made from the log."""

    def parts(self, entity: Entity) -> Sequence[Part]:
        """Return the parts of the items or users, in order."""

    def days(self) -> Sequence[date]:
        """Return the dates that have events, ascending."""

    def day_keys(self, day: date) -> Mapping[str, str]:
        """Return, for requests, events and labels, a digest of all that decides a date's rows."""

    def rows(self, days: Sequence[date]) -> Iterator[tuple[date, Iterable[pa.Table]]]:
        """Yield some of the dates, each with its rows in chunks, joined: see `infra.store.write_day`."""


class Prepare(Config):
    """Settings common to all sources."""

    as_of: Day | None = None
    """The snapshot contains only what happened before this date; by default the whole log."""
    cache_dir: LocalPath = Path(".cache")
    """Cache between runs: text embeddings by the digest of texts and model, and the identities of source files."""

    @property
    def identity_cache(self) -> Path:
        """The file with the identities of source files."""
        return self.cache_dir / IDENTITY_CACHE


class SourceConfig(Config):
    """Base of the sources' settings. A subclass is selected by its `kind`, a `Literal` of one name."""

    kind: str
    """The name of the source."""

    def paths(self) -> Sequence[Path]:
        """Return the files and folders that the source reads; URLs are fetched before `open` and `data_identity`."""
        return ()

    @abstractmethod
    def open(self, run: StageRun[Prepare]) -> Source:
        """Open the log; every rank must call it.

        Raises:
            ConfigError: a required package or directory is missing. DataError: a file breaks the contract.
        """

    @abstractmethod
    def data_identity(self, prepare: Prepare) -> str:
        """Return a digest of the source's files for the stage's key: of their names and identities.

        The digest need not cover the settings, which are in the key already.

        Raises:
            ConfigError: a required package or key is missing. DataError: a file cannot be identified.
        """


def as_time(day: date | None) -> datetime | None:
    """Return the beginning of a day."""
    return None if day is None else datetime.combine(day, time())


def label_keys(
    events: Mapping[str, Any], followup_days: Mapping[str, float], day: date, end: datetime | None
) -> dict[str, str]:
    """Return the keys of a date's three tables.

    Labels that mature are made again if and only if more of them are known: the log's end enters the key only as the
    time of the date up to which follow-up is complete.

    Args:
        events: digest of what decides the requests' and events' rows.
        followup_days: by task, how long after an impression its label is known, if that is before `end`. day: the date.
        end: the log's end, exclusive; None: all labels are known.
    """
    begins = datetime.combine(day, time())
    known: dict[str, Any] = {}
    for task, days in followup_days.items():
        followed_up = timedelta(days=1) if end is None else end - timedelta(days=days) - begins
        part_s = min(max(followed_up, timedelta()), timedelta(days=1)).total_seconds()
        known[task] = {"followup_days": days, "known_s": part_s}
    of_events = digest(events)
    return {"requests": of_events, "events": of_events, "labels": digest({"events": of_events, "known": known})}
