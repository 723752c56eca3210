"""Ingestion of raw files into typed partitions, each file once: casts, checks, and the dates of its rows.

All files are checked before anything is written, and all faults of all files are one error.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from sidestack.infra.code import code_digest
from sidestack.infra.config import digest, plain
from sidestack.infra.errors import DataError
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.remote.urls import url_of
from sidestack.infra.sql import literal, quoted
from sidestack.infra.store import FILE, NewPartition, Store
from sidestack.pipelines.prepare.log.columns import RawColumn, category, condition, key, number, text, time, vector
from sidestack.pipelines.prepare.log.config import ContentFiles, LogConfig
from sidestack.pipelines.prepare.log.files import EVENTS, ITEMS, USERS, RawFiles, Relation, relation
from sidestack.pipelines.prepare.log.masking import IdKind, Masking
from sidestack.pipelines.prepare.log.retention import Retention

CODE = tuple(f"pipelines/prepare/log/{name}.py" for name in ("columns", "files", "ingest", "masking"))
BATCH_ROWS = 1 << 16
_MOST_FAULTS = 30
_SEVERAL = "several:"
ID_COLUMNS: Mapping[str, IdKind] = {
    "user_key": "user", "item_key": "item", "event_id": "event", "request_key": "request"
}  # fmt: skip
_WITHOUT_VALUES = (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException)
"""Errors of a query's text: their messages hold no value of a file."""


@dataclass(frozen=True)
class RawTable:
    """Columns and rules of one kind of files.

    Attributes:
        name: `events`, `items`, `users`, or `labels.<name>`. columns: by their new name.
        required: rows in which one of these is null are dropped and counted.
        has_time: whether rows have an `event_time`, and are sorted by it.
        masked: columns of ids that are written masked -> the kind of id.
        is_private: whether error messages omit values of the file.
    """

    name: str
    columns: Mapping[str, RawColumn]
    required: tuple[str, ...]
    has_time: bool
    masked: Mapping[str, IdKind] = field(default_factory=dict)
    is_private: bool = False


@dataclass(frozen=True)
class RawPart:
    """An ingested file.

    Attributes:
        entry: its partition. origin: the file.
    """

    entry: PartitionEntry
    origin: Path

    def is_kept(self, store: Store) -> bool:
        """Whether its rows are stored: retention deletes rows but keeps the manifest, so no file is read again."""
        folder = store.path / self.entry.path  # nothing is deleted at a URL: what is not here is in the store
        return url_of(folder) is not None or (folder / FILE).is_file()

    @property
    def expired(self) -> int:
        """Number of rows that were older than the retention when the file was read."""
        return self.entry.facts.get("expired", 0)

    @property
    def dropped(self) -> int:
        """Number of rows that lack a required value."""
        return self.entry.facts["dropped"]

    @property
    def several(self) -> dict[str, int]:
        """By column: number of rows with several values; the first is used."""
        facts = self.entry.facts
        return {name.removeprefix(_SEVERAL): facts[name] for name in facts if name.startswith(_SEVERAL)}

    @property
    def days(self) -> dict[date, tuple[int, int]]:
        """Number of rows of each date, and a sum of their hashes, which identifies their content in any order."""
        return row_dates(self.entry.facts)


def row_dates(facts: Mapping[str, int]) -> dict[date, tuple[int, int]]:
    """Return the dates in the facts of an ingested file; see `RawPart.days`."""
    numbers = [int(name.removeprefix("rows_")) for name in facts if name.startswith("rows_")]
    return {date.fromordinal(one): (facts[f"rows_{one}"], facts[f"hash_{one}"]) for one in numbers}


def raw_tables(config: LogConfig) -> dict[str, RawTable]:
    """Return the tables to read, by name."""
    events = config.events
    columns = {"user_key": key(events.user), "item_key": key(events.item), "event_time": time(events.time)}
    if events.event_id is not None:
        columns["event_id"] = key(events.event_id)
    if events.request is not None:
        columns["request_key"] = key(events.request)
    columns |= {f"number:{name}": number(column) for name, column in events.dense.items()}
    columns |= {f"number:{name}": number(name) for name in events.quantiles}
    columns |= {f"value:{name}": category(column) for name, column in events.categoricals.items()}
    columns |= {f"task:{name}": condition(one.where) for name, one in config.tasks.items() if one.table is None}
    found = {EVENTS: RawTable(EVENTS, columns, ("user_key", "item_key", "event_time"), has_time=True)}
    for name, content, own in ((ITEMS, config.items, "item_key"), (USERS, config.users, "user_key")):
        if content is not None:
            found[name] = RawTable(name, _content_columns(own, content), (own,), has_time=False)
    for name, labels in config.labels.items():
        names = {"event_id": labels.event_id, "user_key": labels.user, "item_key": labels.item}
        match = {name: key(column) for name, column in names.items() if column is not None}
        flags = {f"task:{task}": condition(one.where) for task, one in config.tasks.items() if one.table == name}
        columns = {**match, "event_time": time(labels.time), **flags}
        found[f"labels.{name}"] = RawTable(f"labels.{name}", columns, (*match, "event_time"), has_time=True)
    return {name: _private(table, config) for name, table in found.items()}


def _private(table: RawTable, config: LogConfig) -> RawTable:
    """Return a table with the privacy settings of a configuration."""
    if config.privacy.key is None:
        return table
    kinds = {name: kind for name, kind in ID_COLUMNS.items() if kind != "item" or config.privacy.mask_items}
    masked = {name: kind for name, kind in kinds.items() if name in table.columns}
    return replace(table, masked=masked, is_private=True)


def repairs(parts: Mapping[str, Sequence[RawPart]]) -> Iterator[str]:
    """Yield messages on dropped rows and values, by kind of files."""
    for name, found in parts.items():
        if dropped := sum(part.dropped for part in found):
            yield f"{name}: {dropped:,} rows lack an id or a time and are left out"
        if expired := sum(part.expired for part in found):
            yield f"{name}: {expired:,} rows are older than the retention and are left out"
        several: Counter[str] = Counter()
        for part in found:
            several.update(part.several)
        for column, rows in several.items():
            if rows:
                yield f"{name}: {rows:,} rows have several values of {column.partition(':')[2]!r}; the first is taken"


def _content_columns(own: str, content: ContentFiles) -> dict[str, RawColumn]:
    columns = {own: key(content.id)}
    if content.text:
        columns["text"] = text(content.text)
    columns |= {f"value:{name}": category(column) for name, column in content.categoricals.items()}
    return {**columns, **{f"vector:{name}": vector(column) for name, column in content.embeddings.items()}}


def table_settings(config: LogConfig, name: str, masking: Masking | None) -> dict[str, Any]:
    """Return the settings that decide the typed rows of one kind of files; a masking key is represented by its id."""
    found = {
        "settings": plain(config)[name.partition(".")[0]],
        "tasks": {task: one.where for task, one in config.tasks.items()},
    }
    if masking is not None:
        found |= {"masked": dict(raw_tables(config)[name].masked), "key": masking.key_id}
    return found


def ingest(
    config: LogConfig,
    files: RawFiles,
    store: Store,
    database: duckdb.DuckDBPyConnection,
    masking: Masking | None = None,
    retention: Retention | None = None,
) -> tuple[dict[str, list[RawPart]], date]:
    """Write a partition for every file that has none; return all partitions by kind, and the first date kept.

    Args:
        config: the log's. files: all files. store: of partitions. database: a connection.
        masking: how ids are masked. retention: how long rows are kept.

    Raises:
        DataError: lists all faults of all new files.
    """
    tables = raw_tables(config)
    settings = {name: {**table_settings(config, name, masking), "code": code_digest(CODE)} for name in tables}
    keys = {
        (name, file): digest({"file": files.identity[file], **settings[name]})
        for name in tables
        for file in files.tables[name]
    }
    new = [place for place, work in keys.items() if store.find(f"raw/{place[0]}", f"file={work[:16]}", work) is None]
    faults = [fault for name, file in new for fault in file_faults(database, tables[name], file, config.max_dropped)]
    if faults:
        more = [f"... and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        raise DataError("\n".join([f"the raw log has {len(faults)} faults:", *faults[:_MOST_FAULTS], *more]))
    if masking is not None:
        masking.install(database)
    since = date.min
    if retention is not None:
        known = [_part(store, *place, keys) for place in keys.keys() - set(new)]
        since = retention.first_kept(partial(_newest, database, tables, new, known))
    for name, file in new:
        try:
            _write(store, database, tables[name], file, keys[name, file], since)
        except duckdb.Error as error:  # its traceback would show its message, too
            raise DataError(f"{file}: cannot be read: {_error_line(error, tables[name])}") from None
    return {name: [_part(store, name, file, keys) for file in files.tables[name]] for name in tables}, since


def _newest(
    database: duckdb.DuckDBPyConnection,
    tables: Mapping[str, RawTable],
    new: Sequence[tuple[str, Path]],
    known: Sequence[RawPart],
) -> date | None:
    """Return the newest date of all rows, in new and ingested files."""
    found = [day for part in known for day in part.days]
    for name, file in new:
        if tables[name].has_time:
            rows = typed_rows(database, tables[name], relation(database, file, texts_of(tables[name])))
            (newest,) = database.execute(f"SELECT CAST(max(event_time) AS DATE) FROM ({rows})").fetchall()[0]
            found += [newest] if newest is not None else []
    return max(found, default=None)


def _part(store: Store, name: str, file: Path, keys: Mapping[tuple[str, Path], str]) -> RawPart:
    work = keys[name, file]
    return RawPart(store.entry(f"raw/{name}", f"file={work[:16]}", work), file)


def file_faults(database: duckdb.DuckDBPyConnection, table: RawTable, file: Path, max_dropped: float) -> Iterator[str]:
    """Yield all faults of a file, one line each."""
    try:
        read = relation(database, file, texts_of(table))
    except DataError as error:
        yield str(error)
        return
    missing = [name for column in table.columns.values() for name in column.sources if name not in read.types]
    for name in dict.fromkeys(missing):
        yield f"{file}: column {name!r} is missing ({table.name}); the file has {', '.join(read.types)}"
    present = {name: one for name, one in table.columns.items() if all(source in read.types for source in one.sources)}
    try:
        yield from _values_faults(database, read, present, file, table.is_private)
    except duckdb.Error:  # an expression cannot be run at all: find out which
        for name, column in present.items():
            try:
                yield from _values_faults(database, read, {name: column}, file, table.is_private)
            except duckdb.Error as error:
                what = f"column {column.sources[0]!r}" if column.sources else f"condition of {name.partition(':')[2]!r}"
                yield f"{file}: {what}: {_error_line(error, table)}"
        return
    if not missing:
        is_null = " OR ".join(quoted(source) + " IS NULL" for source in _required_sources(table))
        rows, dropped = database.execute(
            f"SELECT count(*), count(*) FILTER (WHERE {is_null}) FROM {read.sql}"
        ).fetchall()[0]
        if dropped > max_dropped * rows:
            yield (
                f"{file}: {dropped:,} of {rows:,} rows lack {', '.join(table.required)}; at most"
                f" {max_dropped:.0%} may (max_dropped)"
            )


def _error_line(error: duckdb.Error, table: RawTable) -> str:
    """Return the first line of an error; for private files, without anything that may be one of their values."""
    if table.is_private and not isinstance(error, _WITHOUT_VALUES):
        return f"{type(error).__name__} (privacy.key: its message is left out, as it may hold values of the file)"
    return str(error).splitlines()[0]


def _required_sources(table: RawTable) -> list[str]:
    return [source for name in table.required for source in table.columns[name].sources]


def _values_faults(
    database: duckdb.DuckDBPyConnection,
    read: Relation,
    columns: Mapping[str, RawColumn],
    file: Path,
    is_private: bool,
) -> Iterator[str]:
    """Yield faults of columns' values: how many values break the rule, and an example unless they are private.

    This takes one pass over the file.
    """
    parts = []
    for column in columns.values():
        set_zone(database, column)
        value = column.sql(read.types)
        if not column.sources:  # a condition: never null, so DuckDB would not evaluate it for a count
            parts += ["0", f"max({value})"]
            continue
        wrong = f"FILTER (WHERE ({column.presence_condition(read.types)}) AND ({value}) IS NULL)"
        shown = "NULL" if is_private else quoted(column.sources[0])
        parts += [f"count(*) {wrong}", f"min(CAST({shown} AS VARCHAR)) {wrong}"]
    found = database.execute(f"SELECT {', '.join(parts)} FROM {read.sql}").fetchall()[0]
    for column, count, example in zip(columns.values(), found[::2], found[1::2], strict=True):
        if count:
            source = column.sources[0]
            kind = read.types[source]
            such = "" if is_private else f", such as {example!r}"
            yield f"{file}: column {source!r} ({kind}) {column.rule}; {count:,} rows do not{such}"


def texts_of(table: RawTable) -> list[str]:
    """Return the columns of the files that must be read as text."""
    return [source for one in table.columns.values() if one.kind == "VARCHAR" for source in one.sources]


def set_zone(database: duckdb.DuckDBPyConnection, column: RawColumn) -> None:
    """Set the session's time zone as a column needs it."""
    if column.zone is not None:
        database.execute(f"SET TimeZone = {literal(column.zone)}")


def _write(
    store: Store, database: duckdb.DuckDBPyConnection, table: RawTable, file: Path, work: str, since: date
) -> None:
    read = relation(database, file, texts_of(table))
    rows = typed_rows(database, table, read)
    masked = ", ".join(f"masked_id('{kind}', {quoted(name)}) AS {quoted(name)}" for name, kind in table.masked.items())
    kept = f" WHERE event_time >= TIMESTAMP '{since}'" if table.has_time and since > date.min else ""
    query = f"SELECT *{f' REPLACE ({masked})' if masked else ''} FROM ({rows}){kept} ORDER BY ALL"
    counted = {name: one.count for name, one in table.columns.items() if one.count is not None}
    several = [f"count(*) FILTER (WHERE {count(read.types)} > 1)" for count in counted.values()]
    total, *numbers = database.execute(f"SELECT {', '.join(['count(*)', *several])} FROM {read.sql}").fetchall()[0]
    with store.new_partition(f"raw/{table.name}", f"file={work[:16]}", work) as made:
        write_query(database, query, made)
        left_out = total - (made.written[FILE].rows or 0)
        if kept:
            old = f"SELECT count(*) FROM ({rows}) WHERE event_time < TIMESTAMP '{since}'"
            (made.numbers["expired"],) = database.execute(old).fetchall()[0]
        made.numbers["dropped"] = left_out - made.numbers.get("expired", 0)
        made.numbers |= {f"{_SEVERAL}{name}": number for name, number in zip(counted, numbers, strict=True)}
        if table.has_time:
            made.numbers |= _days(database, made.path / FILE, list(table.columns))


def typed_rows(database: duckdb.DuckDBPyConnection, table: RawTable, read: Relation) -> str:
    """Return the query of a file's rows with typed columns, time first, without rows that lack an id or a time."""
    for column in table.columns.values():
        set_zone(database, column)
    columns = sorted(table.columns.items(), key=lambda column: column[0] != "event_time")
    values = ", ".join(f"CAST({one.sql(read.types)} AS {one.kind}) AS {quoted(name)}" for name, one in columns)
    kept = " AND ".join(f"{quoted(name)} IS NOT NULL" for name in table.required)
    return f"SELECT * FROM (SELECT {values} FROM {read.sql}) WHERE {kept}"


def write_query(database: duckdb.DuckDBPyConnection, query: str, made: NewPartition) -> None:
    """Write a query's rows into a partition's single file."""
    write_batches(database.sql(query).to_arrow_reader(BATCH_ROWS), made)


def write_batches(rows: pa.RecordBatchReader, made: NewPartition) -> None:
    """Write rows into a partition's single file."""
    made.schema = rows.schema
    with made.open_writer(FILE) as writer:
        for batch in rows:
            writer.write(pa.Table.from_batches([batch]))


def _days(database: duckdb.DuckDBPyConnection, file: Path, names: Sequence[str]) -> dict[str, int]:
    """Return the numbers of `RawPart.days`."""
    columns = ", ".join(map(quoted, names))
    rows = database.execute(
        f"SELECT CAST(event_time AS DATE) AS day, count(*), sum(hash({columns})) % 18446744073709551557"
        f" FROM read_parquet({literal(str(file))}) GROUP BY day ORDER BY day"
    ).fetchall()
    found: dict[str, int] = {}
    for day, count, total in rows:
        found |= {f"rows_{day.toordinal()}": count, f"hash_{day.toordinal()}": int(total)}
    return found
