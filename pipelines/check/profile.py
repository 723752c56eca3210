"""Profile of a raw log, computed by DuckDB from the raw files: counts, rates, and sample sizes for a verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from pathlib import Path

import duckdb

from sidestack.infra.errors import DataError
from sidestack.infra.sql import file_list, quoted
from sidestack.pipelines.prepare.log.config import LogConfig
from sidestack.pipelines.prepare.log.files import EVENTS, ITEMS, RawFiles, relation
from sidestack.pipelines.prepare.log.ingest import RawTable, file_faults, raw_tables, texts_of, typed_rows
from sidestack.pipelines.prepare.log.opened import split_dates

MOST_ROWS = 8_000_000
"""Of a larger log, only events by date are counted in full; all else is from an evenly drawn sample of its files."""


@dataclass(frozen=True)
class TaskProfile:
    """A task whose labels are in the events.

    Attributes:
        positives: rows with label 1. test_positives: those of the test dates.
        both: share of users with both labels.
    """

    positives: int
    test_positives: int
    both: float


@dataclass(frozen=True)
class Profile:
    """The content of a log in numbers.

    Attributes:
        rows: events. first, last: dates. num_days: dates with events. users, items: approximate distinct counts.
        train, test: first and last date of each split; None if there are too few dates.
        listed: share of events whose item is in the catalogue; None without a catalogue.
        cold: share of the test events whose item is on no earlier date.
        ties: share of events with the same user and time as another.
        tasks: by name. texts: distinct texts of the catalogue.
        files, read: number of event files, and how many were read for all but `rows` and dates. seen: events in those
            read.
    """

    rows: int
    first: date
    last: date
    num_days: int
    users: int
    items: int
    train: tuple[date, date] | None
    test: tuple[date, date] | None
    listed: float | None
    cold: float | None
    ties: float
    tasks: Mapping[str, TaskProfile]
    texts: int
    files: int
    read: int
    seen: int


def faults(config: LogConfig, files: RawFiles, database: duckdb.DuckDBPyConnection) -> list[str]:
    """Return all faults of the files that `profile` reads, one line each."""
    found: list[str] = []
    for name, table in raw_tables(config).items():
        chosen = files.tables[name] if name != EVENTS else _sample_files(files.tables[EVENTS], database)
        for file in chosen:
            found += file_faults(database, table, file, config.max_dropped)
    return found


def profile(config: LogConfig, files: RawFiles, database: duckdb.DuckDBPyConnection) -> Profile:
    """Return the profile of a log without faults.

    Raises:
        DataError: the log has no event.
    """
    table, all_files = raw_tables(config)[EVENTS], files.tables[EVENTS]
    times = RawTable(EVENTS, {"event_time": table.columns["event_time"]}, ("event_time",), has_time=True)
    days = database.execute(
        f"SELECT CAST(event_time AS DATE) AS day, count(*) FROM {_view(database, times, all_files)}"
        " GROUP BY day ORDER BY day"
    ).fetchall()
    if not days:
        raise DataError("prepare.source.events.path: the files hold no event")
    splits = _splits(config, [day for day, _ in days])
    in_events = [name for name, one in config.tasks.items() if one.table is None]
    drawn = _sample_files(all_files, database)
    flags = "".join(f", {quoted(f'task:{name}')}" for name in in_events)
    database.execute(  # once, with hashes for keys: everything below reads this
        "CREATE OR REPLACE TEMP TABLE seen AS"
        " SELECT hash(user_key) AS user_key, hash(item_key) AS item_key, event_time,"
        f" CAST(event_time AS DATE) AS day{flags} FROM {_view(database, table, drawn)}"
    )
    seen, users, items = database.execute(
        "SELECT count(*), count(DISTINCT user_key), count(DISTINCT item_key) FROM seen"
    ).fetchall()[0]
    ties = database.execute(
        "SELECT coalesce(sum(n) FILTER (WHERE n > 1) / sum(n), 0) FROM"
        " (SELECT count(*) AS n FROM seen GROUP BY user_key, event_time)"
    ).fetchall()[0][0]
    return Profile(
        rows=sum(count for _, count in days),
        first=days[0][0],
        last=days[-1][0],
        num_days=len(days),
        users=users,
        items=items,
        train=None if splits is None else splits[0],
        test=None if splits is None else splits[1],
        listed=_listed(config, files, database),
        cold=None if splits is None else _cold_share(splits[1], database),
        ties=float(ties),
        tasks={name: _task(name, splits, database) for name in in_events},
        texts=_texts(config, files, database),
        files=len(all_files),
        read=len(drawn),
        seen=seen,
    )


def _sample_files(files: Sequence[Path], database: duckdb.DuckDBPyConnection) -> Sequence[Path]:
    """Return all files of events, or, of a large log, an even sample of them with at most `MOST_ROWS` rows."""
    parquet = [file for file in files if file.suffix == ".parquet"]
    if not parquet:
        return files
    rows = database.execute(f"SELECT sum(num_rows) FROM parquet_file_metadata({file_list(parquet)})").fetchall()[0][0]
    number = max(1, int(len(files) * MOST_ROWS / max(rows, 1)))
    return files if number >= len(files) else [files[len(files) * place // number] for place in range(number)]


def _view(database: duckdb.DuckDBPyConnection, table: RawTable, files: Sequence[Path]) -> str:
    """Return the typed rows of all files, as a subquery."""
    reads = [relation(database, file, texts_of(table)) for file in files]
    return "(" + " UNION ALL BY NAME ".join(f"({typed_rows(database, table, read)})" for read in reads) + ")"


def _splits(config: LogConfig, days: Sequence[date]) -> tuple[tuple[date, date], tuple[date, date]] | None:
    try:
        return split_dates(config, days, datetime.combine(days[-1], time()) + timedelta(days=1))
    except DataError:
        return None


def _task(
    name: str, splits: tuple[tuple[date, date], tuple[date, date]] | None, database: duckdb.DuckDBPyConnection
) -> TaskProfile:
    flag = quoted(f"task:{name}")
    in_test = "false" if splits is None else f"day BETWEEN '{splits[1][0]}' AND '{splits[1][1]}'"
    positives, of_test = database.execute(
        f"SELECT coalesce(sum({flag}), 0), coalesce(sum({flag}) FILTER (WHERE {in_test}), 0) FROM seen"
    ).fetchall()[0]
    both = database.execute(
        "SELECT avg(CAST(low < high AS INTEGER)) FROM"
        f" (SELECT min({flag}) AS low, max({flag}) AS high FROM seen GROUP BY user_key)"
    ).fetchall()[0][0]
    return TaskProfile(int(positives), int(of_test), float(both or 0.0))


def _listed(config: LogConfig, files: RawFiles, database: duckdb.DuckDBPyConnection) -> float | None:
    if config.items is None:
        return None
    items = _view(database, raw_tables(config)[ITEMS], files.tables[ITEMS])
    found = database.execute(
        f"SELECT avg(CAST(item_key IN (SELECT hash(item_key) FROM {items}) AS INTEGER)) FROM seen"
    ).fetchall()[0][0]
    return float(found)


def _cold_share(test: tuple[date, date], database: duckdb.DuckDBPyConnection) -> float:
    found = database.execute(
        f"SELECT sum(n) FILTER (WHERE first >= '{test[0]}') / sum(n) FROM (SELECT min(day) AS first,"
        f" count(*) FILTER (WHERE day BETWEEN '{test[0]}' AND '{test[1]}') AS n FROM seen GROUP BY item_key)"
    ).fetchall()[0][0]
    return float(found or 0.0)


def _texts(config: LogConfig, files: RawFiles, database: duckdb.DuckDBPyConnection) -> int:
    if config.items is None or not config.items.text:
        return 0
    items = _view(database, raw_tables(config)[ITEMS], files.tables[ITEMS])
    return int(database.execute(f"SELECT count(DISTINCT text) FROM {items}").fetchall()[0][0])
