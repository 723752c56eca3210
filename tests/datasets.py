"""Write small snapshots for tests from tables of items, tables of users and each date's joined impressions."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidestack.encoder.generation.sets import listed_set
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.config import digest
from sidestack.infra.impressions import all_columns, read_impressions
from sidestack.infra.parquet import row_groups
from sidestack.infra.partitions import PartitionEntry, date_slice
from sidestack.infra.requests import request_starts, split_rows
from sidestack.infra.snapshot import CONTENT, Dataset, SidSet, Snapshot, read_dataset, write_snapshot
from sidestack.infra.store import FILE, Store, count_labels, day_entries, in_order, write_part
from sidestack.infra.tables import DatasetSpec, Entity, daily_tables


def write_snapshot_of(
    out: Path,
    spec: DatasetSpec,
    items: Sequence[pa.Table] = (),
    users: Sequence[pa.Table] = (),
    days: Mapping[date, pa.Table] | None = None,
    sids: Iterable[SidSpec] = (),
    row_group_rows: int = 128,
) -> Path:
    """Write a snapshot whose store lies in its own folder, so that a test can copy and damage it.

    Args:
        out: the folder.
        spec: the dataset's specification.
        items, users: one table per part.
        days: joined impressions by date. Without a column `request_id` every row is a request of its own. SID columns
            are named as in `encoder.sid.event_columns` and have their spec in their metadata.
        sids: the sets of SIDs whose columns the impressions have.
        row_group_rows: the least number of impressions in a row group; a request is never divided.
    """
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out / "store")
    entries = [*_parts(store, "item", items, spec), *_parts(store, "user", users, spec)]
    listed = {sid.name: _without_content(listed_set(sid)) for sid in sids}
    for day, rows in (days or {}).items():
        numbered = rows if "request_id" in rows.column_names else _numbered(rows, day)
        own = [name for one in listed.values() for names in one.columns.values() for name in names]
        keys = {name: digest({"table": name, "day": str(day)}) for name in daily_tables(spec)}
        _write_day(store, day, keys, spec, numbered.drop_columns(own), row_group_rows)
        made = {entry.table: entry for entry in day_entries(store, day, keys)}
        entries += made.values()
        for name, one in listed.items():
            entries += [
                _sids(store, one.table(name, base), made, base, numbered, names) for base, names in one.columns.items()
            ]
    write_snapshot(out, out, spec, Snapshot(store=str(store.path), sids=listed, partitions=tuple(in_order(entries))))
    return out


def _parts(store: Store, entity: Entity, tables: Sequence[pa.Table], spec: DatasetSpec) -> list[PartitionEntry]:
    first, entries = 0, []
    for number, table in enumerate(tables):
        key = digest({"table": CONTENT[entity], "number": number})
        entries.append(write_part(store, entity, number, key, first, table.schema, [table]))
        first += entries[-1].facts["new"]
    return entries


def _write_day(
    store: Store, day: date, keys: Mapping[str, str], spec: DatasetSpec, rows: pa.Table, row_group_rows: int
) -> None:
    """Write a date's tables as `infra.store.write_day` does, in row groups of at least `row_group_rows` rows."""
    starts_R = request_starts(rows["request_id"])
    cuts = [0]
    while cuts[-1] < rows.num_rows:
        later_R = starts_R[starts_R >= cuts[-1] + row_group_rows]
        cuts.append(int(later_R[0]) if len(later_R) else rows.num_rows)
    for name, key in keys.items():
        with store.new_partition(name, date_slice(day), key) as made:
            made.schema = split_rows(rows.slice(0, 0), spec, str(day))[name].schema
            if name == "labels":
                made.numbers |= count_labels(rows, spec)
            with made.open_writer(FILE) as writer:
                for start, end in itertools.pairwise(cuts):
                    writer.write_group(split_rows(rows.slice(start, end - start), spec, str(day))[name])


def _without_content(one: SidSet) -> SidSet:
    columns = {base: names for base, names in one.columns.items() if base in ("events", "requests")}
    return one.model_copy(update={"columns": columns})


def _numbered(rows: pa.Table, day: date) -> pa.Table:
    ids_N = (day.toordinal() << 32) + np.arange(rows.num_rows)
    return rows.append_column(pa.field("request_id", pa.int64(), nullable=False), pa.array(ids_N))


def _sids(
    store: Store, table: str, made: Mapping[str, PartitionEntry], base: str, rows: pa.Table, names: Sequence[str]
) -> PartitionEntry:
    """Write SID columns for a date's events or requests, with the same row groups."""
    entry = made[base]
    own = rows if base == "events" else rows.take(pa.array(request_starts(rows["request_id"])))
    key = digest({"table": table, "of": entry.slice})
    with store.new_partition(table, entry.slice, key) as making:
        making.schema = own.select(names).schema
        with making.open_writer(FILE) as writer:
            for group in row_groups([store.path / entry.path / FILE]):
                writer.write_group(own.select(names).slice(group.start, group.rows))
    return store.entry(table, entry.slice, key)


def joined(path: Path, columns: Sequence[str] | None = None, first: date = date.min, last: date = date.max) -> pa.Table:
    """Return the joined impressions of some dates as one table, with all columns or those named."""
    dataset = read_dataset(path)
    wanted = all_columns(dataset) if columns is None else columns
    return pa.concat_tables(list(read_impressions(dataset, wanted, first, last))).combine_chunks()


def content(dataset: Dataset, table: str) -> pa.Table:
    """Return all rows of a table of the snapshot, such as the items or a set's SIDs of items."""
    return pa.concat_tables([pq.ParquetFile(file.path).read() for file in dataset.files(table)]).combine_chunks()


def file_of(path: Path, table: str, day: date) -> Path:
    """Return the file of a date's partition."""
    (file,) = read_dataset(path).files(table, day, day)
    return file.path


def spoil(path: Path, table: str, day: date, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Replace a date's partition by a changed one that the snapshot lists, and return its file.

    The changed rows are written in row groups of the original's lengths.
    """
    dataset = read_dataset(path)
    (entry,) = dataset.partitions(table, day, day)
    store = Store(dataset.store)
    file = file_of(path, table, day)
    sizes = [group.rows for group in row_groups([file])]
    whole = pq.ParquetFile(file).read()
    rows = change(whole)
    key = digest({"spoiled": entry.digest, "rows": str(rows.to_pylist())[:10_000]})
    with store.new_partition(table, entry.slice, key) as made:
        made.schema = rows.schema
        made.numbers |= entry.facts
        with made.open_writer(FILE) as writer:
            start = 0
            for size in sizes:
                writer.write_group(rows.slice(start, size))
                start += size
    spoiled = store.entry(table, entry.slice, key).model_copy(update={"columns": entry.columns})
    listed = [spoiled if one == entry else one for one in dataset.snapshot.partitions]
    changed = dataset.snapshot.model_copy(update={"store": str(store.path), "partitions": tuple(listed)})
    write_snapshot(path, path, dataset.spec, changed)
    return store.path / spoiled.path / FILE
