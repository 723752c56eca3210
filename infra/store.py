"""The store of partitions, which are each written once.

A partition's directory is `<table>/<slice>/<key>`. The key covers all that decides its content (configuration, code,
the source's identity). So a partition that exists under its key is not made again. If its source has changed, a new one
is made beside the old one, which earlier snapshots continue to use.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.checks import require_same_columns
from sidestack.infra.commit import committing
from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import AlreadyCommittedError, CommitError, DataError
from sidestack.infra.manifest import FileEntry, fetch_files, find_manifest, verify
from sidestack.infra.parquet import open_parquet, restored_schema
from sidestack.infra.parquet_writer import ROW_GROUP_BYTES, TableWriter
from sidestack.infra.partitions import PartitionEntry, date_slice, entry_of, part_slice
from sidestack.infra.requests import request_groups, require_distinct, split_rows
from sidestack.infra.snapshot import CONTENT, Snapshot, write_snapshot
from sidestack.infra.tables import DatasetSpec, Entity, flat_schema

Ints = npt.NDArray[np.int64]

FILE_ROWS = 1 << 17
"""The most rows of a file of items or users, and so the most that one rank encodes at a time."""
FILE = "part-00000.parquet"
"""The one file of a date."""


@dataclass
class NewPartition:
    """A partition that is being made.

    Attributes:
        path: the directory to write into. schema: schema of its files; the caller sets it.
        numbers: `PartitionEntry.facts`; the caller adds to them.
        written: entries of the files written by `open_writer`, so that the commit need not read them again.
    """

    path: Path
    schema: pa.Schema | None = None
    numbers: dict[str, int] = field(default_factory=dict)
    written: dict[str, FileEntry] = field(default_factory=dict)

    @contextlib.contextmanager
    def open_writer(self, name: str) -> Iterator[TableWriter]:
        """Open one of its Parquet files, and record its digest once it is closed."""
        assert self.schema is not None
        with TableWriter(self.path / name, self.schema) as writer:
            yield writer
        self.written[name] = FileEntry(sha256=writer.digest, bytes=writer.bytes, rows=writer.rows)


@dataclass(frozen=True)
class Store:
    """The directory that holds the partitions of one or more growing datasets."""

    path: Path
    _found: dict[tuple[str, str, str], PartitionEntry] = field(default_factory=dict, repr=False, compare=False)
    """Results of `find`: a committed partition never changes, so its manifest is read once."""
    _whole: set[str] = field(default_factory=set, repr=False, compare=False)
    """Directories of the partitions that `file` has checked."""

    def find(self, table: str, slice_name: str, key: str) -> PartitionEntry | None:
        """Return the partition with a key, without reading its files; None if there is none.

        Raises:
            CommitError: its directory holds a partition of another table or key.
        """
        known = self._found.get((table, slice_name, key))
        if known is not None:
            return known
        place = _place(table, slice_name, key)
        manifest = find_manifest(f"{self.path}/{place}", stage=table, key=key)
        if manifest is None:
            return None
        found = entry_of(table, slice_name, place, manifest)
        return self._found.setdefault((table, slice_name, key), found)

    @contextlib.contextmanager
    def new_partition(self, table: str, slice_name: str, key: str, world: World = ALONE) -> Iterator[NewPartition]:
        """Open a partition, to be filled by this rank alone or by all ranks of a world, and commit it.

        If another process commits the same partition meanwhile, that one is kept: equal keys mean equal rows.
        """
        path = self.path / _place(table, slice_name, key)
        facts: dict[str, object] = {}
        written: dict[str, FileEntry] = {}
        is_open = False
        try:
            with committing(path, world, stage=table, key=key, facts=facts, written=written) as staging:
                is_open = True
                made = NewPartition(staging, written=written)
                yield made
                assert made.schema is not None, f"{table}: the maker set no schema"
                facts.update(columns=columns_digest(made.schema), numbers=made.numbers)
        except AlreadyCommittedError:
            if not is_open:
                raise

    def entry(self, table: str, slice_name: str, key: str) -> PartitionEntry:
        """Return a partition that exists."""
        found = self.find(table, slice_name, key)
        assert found is not None, f"{table}/{slice_name}: was not made"
        return found

    def file(self, entry: PartitionEntry) -> Path:
        """Return the one file of a partition, for DuckDB or Spark, which do not verify page checksums.

        All its bytes are checked on the first call in this process.

        Raises:
            CommitError: the partition is missing, was altered, or is another one.
        """
        if entry.path not in self._whole:
            if verify(self.path / entry.path, stage=entry.table).digest != entry.digest:
                raise CommitError(f"{self.path / entry.path}: is another partition than was found there before")
            self._whole.add(entry.path)
        return self.path / entry.path / FILE


def _place(table: str, slice_name: str, key: str) -> str:
    """Return a partition's directory, relative to the store."""
    return f"{table}/{slice_name}/{key[:16]}"


def columns_digest(schema: pa.Schema) -> str:
    """Return a digest of a schema's names and types."""
    lines = "\n".join(f"{name} {kind}" for name, kind in zip(schema.names, schema.types, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def write_part(
    store: Store,
    entity: Entity,
    number: int,
    key: str,
    first: int,
    schema: pa.Schema,
    chunks: Iterable[pa.Table],
    origin: str = "",
) -> PartitionEntry:
    """Write a part of the items or users, in files of `FILE_ROWS`.

    Args:
        store: the store. entity: items or users. number: number of the part, from 0. key: see `Store`.
        first: number of items (users) in the parts before it: its first new id.
        schema: schema of the table. chunks: its rows. Ids ascend; those below `first` revise earlier rows, the others
            continue from `first` without a gap.
        origin: the source of the rows, for errors; by default the part's own name.

    Raises:
        DataError: ids break the rule.
    """
    table, slice_name = CONTENT[entity], part_slice(number)
    where = origin or f"{table}/{slice_name}"
    with store.new_partition(table, slice_name, key) as made:
        made.schema = schema
        last, new = -1, 0
        for file, part in enumerate(_cut_into_parts(chunks, schema, FILE_ROWS)):
            with made.open_writer(f"part-{file:05d}.parquet") as writer:
                for chunk in part:
                    last, new = _check_ids(chunk, f"{entity}_id", last, first, new, where)
                    writer.write(chunk)
        made.numbers |= {"first": first, "new": new}
    return store.entry(table, slice_name, key)


def write_items(
    store: Store, path: Path, spec: DatasetSpec, key: str, schema: pa.Schema, chunks: Iterable[pa.Table]
) -> None:
    """Write a dataset of items alone: one part of them, and its snapshot.

    Args:
        store: the store, which may already have the part. path: the snapshot's directory, such as one being committed.
        spec: the dataset's. key: covers what decides the rows; see `Store`. schema, chunks: the rows and their schema.

    Raises:
        DataError: ids do not ascend from 0 without a gap.
    """
    entry = store.find(CONTENT["item"], part_slice(0), key) or write_part(store, "item", 0, key, 0, schema, chunks)
    write_snapshot(path, path, spec, Snapshot(store=str(store.path), partitions=(entry,)))


def _cut_into_parts(chunks: Iterable[pa.Table], schema: pa.Schema, rows: int) -> Iterator[Iterator[pa.Table]]:
    """Yield iterators over the chunks, each of at most `rows` rows; at least one, which may be empty."""
    rest = iter(chunks)
    pending = next(rest, schema.empty_table())

    def part() -> Iterator[pa.Table]:
        nonlocal pending
        left = rows
        while left and pending is not None:
            taken = pending.slice(0, left)
            yield taken
            left -= taken.num_rows
            pending = pending.slice(taken.num_rows)
            if not pending.num_rows:
                pending = next(rest, None)

    yield part()
    while pending is not None:
        yield part()


def _check_ids(chunk: pa.Table, column: str, last: int, first: int, new: int, where: str) -> tuple[int, int]:
    """Check that a chunk's ids continue those before; return the last one and the number of new ids so far."""
    ids_N = chunk[column].to_numpy()
    if not len(ids_N):
        return last, new
    before_N = np.concatenate([[last], ids_N[:-1]])
    falling = np.flatnonzero(ids_N <= before_N)
    if len(falling):
        raise DataError(
            f"{where}: column {column!r}: ids must rise; {ids_N[falling[0]]} follows {before_N[falling[0]]}"
        )
    new_M = ids_N[ids_N >= first]
    expected_M = np.arange(first + new, first + new + len(new_M))
    gaps = np.flatnonzero(new_M != expected_M)
    if len(gaps):
        raise DataError(
            f"{where}: column {column!r}: new ids must continue from {first} without a gap; {expected_M[gaps[0]]} is"
            f" expected, {new_M[gaps[0]]} is there"
        )
    return int(ids_N[-1]), new + len(new_M)


def write_day(
    store: Store,
    day: date,
    keys: Mapping[str, str],
    spec: DatasetSpec,
    chunks: Iterable[pa.Table],
    row_group_bytes: int = ROW_GROUP_BYTES,
) -> None:
    """Write a date's requests, events and labels, or some of these, from joined rows.

    Args:
        store: the store. day: the date. keys: keys of the tables to write; see `Store`.
        spec: the dataset's.
        chunks: rows of `infra.tables.flat_schema`, with the rows of a request adjacent; further columns go to the
            events. A request may continue in the next chunk.
        row_group_bytes: a row group ends with the request that reaches so many bytes of joined rows. This bounds the
            memory to read one, and all three tables have the same row groups.

    Raises:
        DataError: rows of one request differ in a column of the requests table, or a request occurs twice.
    """
    with contextlib.ExitStack() as stack:
        made = {
            name: stack.enter_context(store.new_partition(name, date_slice(day), key)) for name, key in keys.items()
        }
        writers: dict[str, TableWriter] = {}
        where, request_ids = f"events/{date_slice(day)}", []
        for group in request_groups(_at_least_one_chunk(chunks, spec), row_group_bytes):
            parts = split_rows(group, spec, where)
            request_ids.append(parts["requests"]["request_id"].to_numpy())
            for name, making in made.items():
                if name not in writers:
                    making.schema = parts[name].schema
                    writers[name] = stack.enter_context(making.open_writer(FILE))
                if group.num_rows:
                    writers[name].write_group(parts[name])
                for column, largest in _largest_ids(parts[name]).items():
                    making.numbers[column] = max(making.numbers.get(column, -1), largest)
                if name == "labels":
                    for what, number in count_labels(parts[name], spec).items():
                        making.numbers[what] = making.numbers.get(what, 0) + number
        require_distinct(np.concatenate(request_ids), where)


def _at_least_one_chunk(chunks: Iterable[pa.Table], spec: DatasetSpec) -> Iterator[pa.Table]:
    """Yield the chunks; for a day without events one empty table."""
    is_empty = True
    for chunk in chunks:
        is_empty = False
        yield chunk
    if is_empty:
        yield flat_schema(spec).empty_table()


def _largest_ids(table: pa.Table) -> dict[str, int]:
    """Return the largest item and user id of a date's rows: the rows need the SIDs of ids up to these."""
    found: dict[str, int] = {}
    for column, name in (("item_id", "max_item_id"), ("history_item_ids", "max_item_id"), ("user_id", "max_user_id")):
        if column in table.column_names:
            values = table[column]
            largest = pc.max(pc.list_flatten(values) if pa.types.is_list(values.type) else values).as_py()
            found[name] = max(found.get(name, -1), -1 if largest is None else largest)
    return found


def count_labels(labels: pa.Table, spec: DatasetSpec) -> dict[str, int]:
    """Count, for each task, the evaluated rows (`judged_<task>`) and the positives among them (`positive_<task>`).

    A row is evaluated if its label is known and the labels of all ancestor tasks are 1.
    """
    counts: dict[str, int] = {}
    for task in spec.tasks:
        column = labels[task]
        judged = column.is_valid()
        for parent in spec.ancestors(task):
            judged = pc.and_(judged, pc.fill_null(pc.equal(labels[parent], 1), False))
        positive = pc.and_(judged, pc.fill_null(pc.equal(column, 1), False))
        counts |= {f"judged_{task}": pc.sum(judged).as_py() or 0, f"positive_{task}": pc.sum(positive).as_py() or 0}
    return counts


def day_entries(store: Store, day: date, keys: Mapping[str, str]) -> list[PartitionEntry]:
    """Return a date's partitions; all of them must exist."""
    return [store.entry(name, date_slice(day), key) for name, key in keys.items()]


def missing_keys(store: Store, day: date, keys: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of a date's missing partitions."""
    return {name: key for name, key in keys.items() if store.find(name, date_slice(day), key) is None}


def require_same_columns_in_tables(store: Store, entries: Iterable[PartitionEntry]) -> None:
    """Check that all partitions of a table have the same columns, with the same types.

    Raises:
        DataError: naming the partitions and the column.
    """
    firsts: dict[str, PartitionEntry] = {}
    for entry in entries:
        first = firsts.setdefault(entry.table, entry)
        if entry.columns != first.columns:
            own, known = (_schema_of(store, one) for one in (entry, first))
            require_same_columns(own, known, f"{entry.table}/{entry.slice}", f"{first.table}/{first.slice}")


def _schema_of(store: Store, entry: PartitionEntry) -> pa.Schema:
    fetch_files(store.path / entry.path, entry.files[0].name)
    with open_parquet(store.path / entry.path / entry.files[0].name) as file:
        return restored_schema(file.schema_arrow)


def in_order(entries: Iterable[PartitionEntry]) -> Sequence[PartitionEntry]:
    """Sort partitions as a snapshot lists them: by table, then by date or part."""
    return sorted(entries, key=lambda entry: (entry.table, entry.slice))
