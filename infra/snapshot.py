"""Snapshots: the list of partitions that a stage reads as its dataset, and functions to read and write it.

A dataset grows and is never rewritten. Its rows are in a *store*, as *partitions*: one date of requests, events,
labels or SID columns, or one part of the items or users. A partition is a directory that was committed once, with a
manifest of its own. A *snapshot* is a directory with

    snapshot.json   the lists of its partitions, by digest (`infra.partitions`), and the path of their store
    dataset.json    the DatasetSpec: signals, features, tasks, splits

Two snapshots that share a partition share its files. The digest of a snapshot's own manifest covers the digests of
all its partitions, so the key of a stage that reads a snapshot depends on the data.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, model_validator

from sidestack.infra.config import Config, digest, parse
from sidestack.infra.distributed import World, local_size, raise_on_all_ranks
from sidestack.infra.errors import CommitError, DataError
from sidestack.infra.manifest import MANIFEST, Manifest, fetch_files, read_manifest, verify
from sidestack.infra.partitions import ListDigest, PartitionEntry, by_table, date_slice, read_lists, write_lists
from sidestack.infra.remote.urls import url_of
from sidestack.infra.rows import CountedFile
from sidestack.infra.tables import SPEC_FILE, DatasetSpec, Entity, read_json, read_spec, write_spec

SNAPSHOT_FILE = "snapshot.json"
CONTENT: Mapping[Entity, str] = {"item": "items", "user": "users"}
"""The tables that have parts, by entity."""


class Encoding(Config):
    """The encoder of the SIDs for a range of ids that begins at `first`."""

    first: NonNegativeInt
    """The first id."""
    revision: str
    """The encoder's revision, see `encoder.bundle`."""


class SidSet(Config):
    """One set of Semantic IDs in a snapshot."""

    generation: str
    """Folder of the set's partitions. It identifies the spec and codebook, and the revision of an encoder that was
    refreshed before it produced the first SIDs."""
    spec: dict[str, Any]
    """The set's `encoder.sid.SidSpec`, as plain data."""
    columns: dict[str, tuple[str, ...]]
    """Its columns, by the table they are row-aligned with."""
    encodings: tuple[Encoding, ...] = ()
    """The encoder revisions that produced the SIDs, in order of ids; empty: the one that began the generation."""

    def table(self, name: str, base: str) -> str:
        """Return the name of the table with its columns that are row-aligned with `base`."""
        return f"sids/{name}/{self.generation}/{base}"


class _SnapshotFields(Config):
    """The fields of a snapshot other than its partitions."""

    store: str
    """The store's directory, relative to the snapshot's own; a tree that is copied whole stays readable."""
    as_of: datetime | None = None
    """The snapshot's cut-off: it holds no data from this time or later. None: the end of the log."""
    sids: dict[str, SidSet] = {}
    """The sets of Semantic IDs, by name."""


class SnapshotFile(_SnapshotFields):
    """The content of `snapshot.json`."""

    format: Literal["sidestack-snapshot/3"] = "sidestack-snapshot/3"
    lists: dict[str, tuple[ListDigest, ...]]
    """By table, the digests of the lists of its partitions, in order."""


class Snapshot(_SnapshotFields):
    """A snapshot with the partitions that its lists name."""

    partitions: tuple[PartitionEntry, ...]
    """By table, each in order of date or part."""

    @model_validator(mode="after")
    def _check_order(self) -> "Snapshot":
        for table, entries in by_table(self.partitions).items():
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
        tables = by_table(self.partitions)
        for base, others in _aligned_tables(tables):
            wanted = {entry.slice: entry for entry in tables.get(base, ())}
            for table in others:
                found = {entry.slice: entry for entry in tables.get(table, ())}
                for name in sorted(wanted.keys() ^ found.keys()):
                    raise ValueError(f"partitions: {name} is listed of only one of {base} and {table}")
                for name, entry in found.items():
                    _require_alike(entry, wanted[name], has_same_rows=base != "events" or table != "requests")
        return self


def _aligned_tables(tables: Mapping[str, object]) -> Iterator[tuple[str, list[str]]]:
    """Yield each base table with the tables that must have the same slices and files."""
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
        path: the snapshot's directory. spec: its `dataset.json`. snapshot: its partitions and other fields.
    """

    path: Path
    spec: DatasetSpec
    snapshot: Snapshot

    @cached_property
    def store(self) -> Path:
        """The directory of the partitions."""
        return store_of(self.path, self.snapshot)

    @cached_property
    def _is_remote(self) -> bool:
        return url_of(self.store) is not None

    @cached_property
    def _tables(self) -> dict[str, list[PartitionEntry]]:
        return by_table(self.snapshot.partitions)

    def partitions(self, table: str, first: date = date.min, last: date = date.max) -> Sequence[PartitionEntry]:
        """Return a table's partitions in order; for a table by date those from `first` to `last`, inclusive."""
        entries = self._tables.get(table, [])
        if first == date.min and last == date.max:
            return entries
        return [entry for entry in entries if first <= entry.date <= last]

    def files(self, table: str, first: date = date.min, last: date = date.max) -> tuple[CountedFile, ...]:
        """Return a table's files in order; for a table by date those from `first` to `last`, inclusive.

        If the store is a URL, they are this machine's copies, fetched unless `verify` has already done so.
        """
        return tuple(file for entry in self.partitions(table, first, last) for file in self.files_of(entry))

    def files_of(self, entry: PartitionEntry) -> tuple[CountedFile, ...]:
        """Return a partition's files in order; see `files`."""
        folder = self.store / entry.path
        if self._is_remote and not (folder / MANIFEST).is_file():
            self.verify_partition(entry)
        return tuple(CountedFile(folder / file.name, file.rows) for file in entry.files)

    def on_date(self, day: date) -> list[PartitionEntry]:
        """Return a date's partitions of all tables."""
        name = date_slice(day)
        return [entry for entry in self.snapshot.partitions if entry.slice == name]

    def content_files(self, entity: Entity) -> tuple[CountedFile, ...]:
        """Return the files of the table with the content of items or of users, in order.

        Raises:
            DataError: the snapshot has none.
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

        If the store is a URL, each node has copies of all of them afterwards.

        Raises:
            CommitError: a partition is missing or was altered. StageError: the same, found by another rank.
        """
        first, step = (world.local_rank, local_size(world)) if self._is_remote else (world.rank, world.size)
        with raise_on_all_ranks(world, f"verifying the partitions of {self.path}"), ThreadPoolExecutor(4) as pool:
            for _ in pool.map(self.verify_partition, entries[first::step]):
                pass

    def verify_partition(self, entry: PartitionEntry) -> None:
        """Check all bytes of one partition.

        Raises:
            CommitError: it is missing or was altered.
        """
        _require_listed(verify(self.store / entry.path), self, entry)

    def require_partition(self, entry: PartitionEntry) -> None:
        """Check that one partition exists, without reading its files.

        Raises:
            CommitError: it is missing, or another one is in its place.
        """
        _require_listed(read_manifest(self.store / entry.path), self, entry)


def _require_listed(manifest: Manifest, dataset: Dataset, entry: PartitionEntry) -> None:
    if manifest.digest != entry.digest:
        raise CommitError(
            f"{dataset.store / entry.path}: is another partition than {dataset.path / SNAPSHOT_FILE} lists"
            f" (digest {manifest.digest[:12]}…, listed {entry.digest[:12]}…)"
        )


def store_of(path: Path, known: _SnapshotFields) -> Path:
    """Return the directory of the partitions of the snapshot at a path."""
    return Path(os.path.normpath(path / known.store))


def read_dataset(path: Path) -> Dataset:
    """Open the snapshot in a directory.

    Its partitions are not checked: `Dataset.verify` checks those that are about to be read.

    Raises:
        DataError: there is no snapshot, or it breaks its rules. ConfigError: `dataset.json` breaks the DatasetSpec.
        CommitError: a list of its partitions is missing or was altered.
    """
    fetch_files(Path(path), SPEC_FILE, SNAPSHOT_FILE)
    spec = read_spec(Path(path) / SPEC_FILE)
    file = Path(path) / SNAPSHOT_FILE
    written = parse(SnapshotFile, read_json(file), str(file))
    partitions = read_lists(store_of(path, written), written.lists)
    known = {name: getattr(written, name) for name in _SnapshotFields.model_fields}
    dataset = Dataset(Path(path), spec, parse(Snapshot, {**known, "partitions": partitions}, str(file)))
    if spec.tasks and dataset.partitions("events") and not dataset.partitions("labels"):
        raise DataError(f"{file}: lists events and no labels, for the tasks {', '.join(spec.tasks)}")
    return dataset


def content_digest(path: Path, entity: Entity) -> str:
    """Return a digest of only a snapshot's items or users: it does not depend on the dates of events.

    Raises:
        DataError, ConfigError: see `read_dataset`.
    """
    dataset = read_dataset(path)
    _, _, embeddings, categoricals = dataset.spec.content(entity)
    parts = [entry.digest for entry in dataset.partitions(CONTENT[entity])]
    return digest({"embeddings": dict(embeddings), "categoricals": dict(categoricals), "parts": parts})


def write_snapshot(path: Path, target: Path, spec: DatasetSpec, snapshot: Snapshot) -> None:
    """Write a snapshot's two files, and into its store the lists of partitions that it lacks.

    Args:
        path: the directory to write to, such as one being committed. target: the directory's final path.
        spec: the dataset's. snapshot: the snapshot; its `store` is the store's path, which is stored relative to
            `target`.
    """
    store = os.path.relpath(Path(snapshot.store).absolute(), Path(target).absolute())
    lists = write_lists(Path(snapshot.store), snapshot.partitions)
    written = SnapshotFile(store=Path(store).as_posix(), as_of=snapshot.as_of, sids=snapshot.sids, lists=lists)
    write_spec(path, spec)
    (path / SNAPSHOT_FILE).write_text(written.model_dump_json(indent=1) + "\n", encoding="utf-8")
