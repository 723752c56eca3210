"""A snapshot: the list of partitions that a stage takes as its dataset, and what opens it.

A dataset grows and is never rewritten. Its rows lie in a *store*, as *partitions*: one date of requests, events,
labels or SID columns, or one part of the items or users. A partition is a directory that was committed once, with a
manifest of its own. A *snapshot* is a directory with

    snapshot.json   the partitions, by path and digest, and where their store is
    dataset.json    the DatasetSpec: signals, features, tasks, splits

Two snapshots that share a partition share its files. The digest of a snapshot's own manifest covers the digests of
all its partitions, so a stage that takes a snapshot is keyed by the data.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, model_validator

from infra.commit import Manifest, verify
from infra.config import Config, digest, parse
from infra.distributed import World, together
from infra.errors import CommitError, DataError
from infra.rows import CountedFile
from infra.tables import SPEC_FILE, DatasetSpec, Entity, read_json, read_spec, write_spec

SNAPSHOT_FILE = "snapshot.json"
CONTENT: Mapping[Entity, str] = {"item": "items", "user": "users"}
"""The tables that have parts, by whose content they hold."""


class PartitionFile(Config):
    """One Parquet file of a partition."""

    name: str
    rows: NonNegativeInt


class PartitionEntry(Config):
    """One partition, as a snapshot lists it."""

    table: str
    """`items`, `users`, `requests`, `events` or `labels`; of SID columns `sids/<set>/<generation>/<table>`."""
    slice: str
    """Which part of the table: `date=2024-01-31`, or `part=00003`."""
    path: str
    """Its directory, from the store's."""
    digest: str
    """Of its manifest: names and contents of its files."""
    columns: str
    """Digest of the names and types of its columns."""
    files: tuple[PartitionFile, ...]
    """Its Parquet files, in order."""
    facts: dict[str, int] = {}
    """Numbers that readers need without opening the files: `first` and `new` of parts, `max_item_id` of dates."""

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def date(self) -> date:
        """The date that it holds.

        Raises:
            DataError: it is not a date's partition.
        """
        return slice_date(self.slice, self.path)


def date_slice(day: date) -> str:
    """Return the name of a date's slice."""
    return f"date={day.isoformat()}"


def part_slice(number: int) -> str:
    """Return the name of the slice of a part of the items or users, numbered from 0."""
    return f"part={number:05d}"


def slice_date(name: str, where: object) -> date:
    """Return the date of a slice or folder named `date=YYYY-MM-DD`.

    Raises:
        DataError: it has another name.
    """
    try:
        return date.fromisoformat(name.removeprefix("date=")) if name.startswith("date=") else _refuse_date(where)
    except ValueError:
        return _refuse_date(where)


def _refuse_date(where: object) -> date:
    raise DataError(f"{where}: must lie in a folder named date=YYYY-MM-DD")


class SidSet(Config):
    """One set of Semantic IDs that a snapshot carries."""

    generation: str
    """Names the spec and codebook: the folder of its partitions."""
    spec: dict[str, Any]
    """The set's `encoder.sid.SidSpec`, as plain data."""
    columns: dict[str, tuple[str, ...]]
    """Its columns, by the table they are row-aligned with."""

    def table(self, name: str, base: str) -> str:
        """Return the name of the table of its columns that are row-aligned with `base`."""
        return f"sids/{name}/{self.generation}/{base}"


class Snapshot(Config):
    """The content of `snapshot.json`."""

    format: Literal["sidestack-snapshot/2"] = "sidestack-snapshot/2"
    store: str
    """The store's directory, from the snapshot's own; a tree that is copied whole stays readable."""
    as_of: datetime | None = None
    """What the snapshot knows ends here: nothing in it is from this time or later. None: the end of the log."""
    sids: dict[str, SidSet] = {}
    """The sets of Semantic IDs, by name."""
    partitions: tuple[PartitionEntry, ...]
    """By table, each in order of date or part."""

    @model_validator(mode="after")
    def _check_order(self) -> "Snapshot":
        for table, entries in _by_table(self.partitions).items():
            slices = [entry.slice for entry in entries]
            for before, after in itertools.pairwise(slices):
                if before == after:
                    raise ValueError(f"partitions: {table}/{after} is listed twice")
                if before > after:
                    raise ValueError(f"partitions: {table}/{after} is listed after {table}/{before}: out of order")
            first = entries[0]
            for entry in entries:
                if entry.columns != first.columns:
                    raise ValueError(f"partitions: {entry.path} and {first.path} have different columns or types")
        return self

    @model_validator(mode="after")
    def _check_alignment(self) -> "Snapshot":
        """Check that row-aligned tables have the same slices, files and rows."""
        tables = _by_table(self.partitions)
        for base, others in _aligned(tables):
            wanted = {entry.slice: entry for entry in tables.get(base, ())}
            for table in others:
                found = {entry.slice: entry for entry in tables.get(table, ())}
                for name in sorted(wanted.keys() ^ found.keys()):
                    raise ValueError(f"partitions: {name} is listed of only one of {base} and {table}")
                for name, entry in found.items():
                    _require_alike(entry, wanted[name], has_same_rows=base != "events" or table != "requests")
        return self


def _by_table(entries: Iterable[PartitionEntry]) -> dict[str, list[PartitionEntry]]:
    tables: dict[str, list[PartitionEntry]] = {}
    for entry in entries:
        tables.setdefault(entry.table, []).append(entry)
    return tables


def _aligned(tables: Mapping[str, object]) -> Iterator[tuple[str, list[str]]]:
    """Yield each base table with the tables whose slices and files must be the same."""
    for base in ("events", "requests", *CONTENT.values()):
        others = [table for table in tables if table.startswith("sids/") and table.endswith(f"/{base}")]
        if base == "events":
            others += ["requests"] if base in tables or "requests" in tables else []
            others += ["labels"] if "labels" in tables else []  # a dataset without tasks has none
        yield base, others


def _require_alike(entry: PartitionEntry, base: PartitionEntry, has_same_rows: bool) -> None:
    names, base_names = ([file.name for file in one.files] for one in (entry, base))
    if names != base_names:
        raise ValueError(f"partitions: {entry.path} has the files {names}, {base.path} has {base_names}")
    for file, other in zip(entry.files, base.files, strict=True):
        if has_same_rows and file.rows != other.rows:
            raise ValueError(
                f"partitions: {entry.path}/{file.name} has {file.rows} rows, {base.path}/{other.name} has {other.rows}:"
                " they must be row-aligned"
            )


@dataclass(frozen=True)
class Dataset:
    """An open snapshot.

    Attributes:
        path: the snapshot's directory. spec: its `dataset.json`. snapshot: its `snapshot.json`.
    """

    path: Path
    spec: DatasetSpec
    snapshot: Snapshot

    @cached_property
    def store(self) -> Path:
        """The directory of the partitions."""
        return Path(os.path.normpath(self.path / self.snapshot.store))

    @cached_property
    def _tables(self) -> dict[str, list[PartitionEntry]]:
        return _by_table(self.snapshot.partitions)

    def partitions(self, table: str, first: date = date.min, last: date = date.max) -> Sequence[PartitionEntry]:
        """Return a table's partitions in order; of a table by date those from `first` to `last`, inclusive."""
        entries = self._tables.get(table, [])
        if first == date.min and last == date.max:
            return entries
        return [entry for entry in entries if first <= entry.date <= last]

    def files(self, table: str, first: date = date.min, last: date = date.max) -> tuple[CountedFile, ...]:
        """Return a table's files in order; of a table by date those from `first` to `last`, inclusive."""
        return tuple(
            CountedFile(self.store / entry.path / file.name, file.rows)
            for entry in self.partitions(table, first, last)
            for file in entry.files
        )

    def on_date(self, day: date) -> list[PartitionEntry]:
        """Return a date's partitions of all tables."""
        name = date_slice(day)
        return [entry for entry in self.snapshot.partitions if entry.slice == name]

    def content_files(self, entity: Entity) -> tuple[CountedFile, ...]:
        """Return the files of the table that has the content of items or of users, in order.

        Raises:
            DataError: it has none.
        """
        files = self.files(CONTENT[entity])
        if not files:
            raise DataError(f"{self.path}: the snapshot lists no partition of {CONTENT[entity]}")
        return files

    def dates(self, first: date = date.min, last: date = date.max) -> list[date]:
        """Return the dates that have events, from `first` to `last`, inclusive."""
        return [entry.date for entry in self.partitions("events", first, last)]

    def verify(self, world: World, entries: Sequence[PartitionEntry]) -> None:
        """Check partitions against the snapshot and their manifests; each rank hashes its share. Every rank calls.

        Raises:
            CommitError: a partition is gone, or was altered. StageError: the same, found by another rank.
        """
        with together(world, f"verifying the partitions of {self.path}"), ThreadPoolExecutor(4) as pool:
            for _ in pool.map(self.verify_partition, entries[world.rank :: world.size]):
                pass

    def verify_partition(self, entry: PartitionEntry) -> None:
        """Check one partition, all its bytes.

        Raises:
            CommitError: it is gone, or was altered.
        """
        _require_listed(verify(self.store / entry.path), self, entry)


def _require_listed(manifest: Manifest, dataset: Dataset, entry: PartitionEntry) -> None:
    if manifest.digest != entry.digest:
        raise CommitError(
            f"{dataset.store / entry.path}: is another partition than {dataset.path / SNAPSHOT_FILE} lists"
            f" (digest {manifest.digest[:12]}…, listed {entry.digest[:12]}…)"
        )


def read_dataset(path: Path) -> Dataset:
    """Open the snapshot in a directory.

    Its partitions are not looked at: `Dataset.verify` checks those that are about to be read.

    Raises:
        DataError: there is no snapshot, or it breaks its rules. ConfigError: `dataset.json` breaks the DatasetSpec.
    """
    spec = read_spec(Path(path) / SPEC_FILE)
    file = Path(path) / SNAPSHOT_FILE
    dataset = Dataset(Path(path), spec, parse(Snapshot, read_json(file), str(file)))
    if spec.tasks and dataset.partitions("events") and not dataset.partitions("labels"):
        raise DataError(f"{file}: lists events and no labels, for the tasks {', '.join(spec.tasks)}")
    return dataset


def content_digest(path: Path, entity: Entity) -> str:
    """Return a digest of a snapshot's items or users alone: the same however many dates of events it has.

    Raises:
        DataError, ConfigError: see `read_dataset`.
    """
    dataset = read_dataset(path)
    _, _, embeddings, categoricals = dataset.spec.content(entity)
    parts = [entry.digest for entry in dataset.partitions(CONTENT[entity])]
    return digest({"embeddings": dict(embeddings), "categoricals": dict(categoricals), "parts": parts})


def write_snapshot(path: Path, target: Path, spec: DatasetSpec, snapshot: Snapshot) -> None:
    """Write a snapshot's two files.

    Args:
        path: where to write, such as a directory that is being committed. target: where the directory will be.
        spec: the dataset's. snapshot: its partitions; its `store` is the store's path, which is made relative to
            `target`.
    """
    store = os.path.relpath(Path(snapshot.store).absolute(), Path(target).absolute())
    write_spec(path, spec)
    relative = snapshot.model_copy(update={"store": Path(store).as_posix()})
    (path / SNAPSHOT_FILE).write_text(relative.model_dump_json() + "\n", encoding="utf-8")


def entry_of(store: Path, table: str, slice_name: str, path: Path, manifest: Manifest) -> PartitionEntry:
    """Describe a committed partition by its manifest, without reading its files."""
    files = sorted((name, entry.rows) for name, entry in manifest.files.items() if name.endswith(".parquet"))
    return PartitionEntry(
        table=table,
        slice=slice_name,
        path=path.relative_to(store).as_posix(),
        digest=manifest.digest,
        columns=manifest.facts["columns"],
        files=tuple(PartitionFile(name=name, rows=rows or 0) for name, rows in files),
        facts=manifest.facts["numbers"],
    )
