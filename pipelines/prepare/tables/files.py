"""The Parquet files of a folder, with their dates and identities."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from sidestack.infra.errors import DataError
from sidestack.infra.identity import IdentityCache
from sidestack.infra.partitions import slice_date
from sidestack.infra.snapshot import CONTENT
from sidestack.infra.tables import Entity
from sidestack.pipelines.prepare.tables.config import TablesConfig


@dataclass(frozen=True)
class LogFiles:
    """The Parquet files of a folder, and their identities.

    Attributes:
        content: by entity, the files of the items or users, in the order of their ids.
        events: by date. labels: by date, if labels are in separate files. identity: of each file, without its name.
    """

    content: Mapping[Entity, Sequence[Path]]
    events: Mapping[date, Sequence[Path]]
    labels: Mapping[date, Sequence[Path]]
    identity: Mapping[Path, str] = field(default_factory=dict)

    def all(self) -> list[Path]:
        """Return every file."""
        dated = itertools.chain(self.events.values(), self.labels.values())
        return [path for files in (*self.content.values(), *dated) for path in files]

    def digest(self, files: Iterable[Path]) -> list[list[str]]:
        """Return names and identities of files."""
        return [[path.name, self.identity[path]] for path in files]


def log_files(config: TablesConfig, as_of: date | None, identity_cache: Path) -> LogFiles:
    """Find and identify the files of a folder that were known before `as_of`.

    Raises:
        DataError: a folder has no file, a name is not a date, or a file cannot be identified.
    """
    content: dict[Entity, Sequence[Path]] = {
        entity: _content_files(config.path / folder, as_of) for entity, folder in CONTENT.items()
    }
    events = _dated(config.path / "events", as_of)
    if not events:
        before = f" before {as_of}" if as_of else ""
        raise DataError(f"{config.path}/events: holds no Parquet file in a folder date=YYYY-MM-DD{before}")
    labels = _dated(config.path / "labels", as_of)
    for day in sorted(labels.keys() - events.keys()):
        raise DataError(f"{config.path}/labels/date={day}: there are no events of this date")
    found = LogFiles(content, events, labels)
    identity = IdentityCache(identity_cache).identities(found.all(), config.identify)
    return LogFiles(content, events, labels, identity)


def _content_files(folder: Path, as_of: date | None) -> list[Path]:
    """Return the files of the items or users: those known from the start, then those of each date."""
    dated = _dated(folder, as_of)
    files = [*sorted(folder.glob("*.parquet")), *(path for day in sorted(dated) for path in dated[day])]
    if not files:
        raise DataError(f"{folder}: holds no Parquet file")
    return files


def _dated(folder: Path, as_of: date | None) -> dict[date, list[Path]]:
    """Return the files of each date's folder, for dates before `as_of`."""
    found = {slice_date(path.name, path): sorted(path.glob("*.parquet")) for path in sorted(folder.glob("*/"))}
    return {day: files for day, files in found.items() if as_of is None or day < as_of}
