"""What a raw log holds, read by DuckDB from the raw files: counts, rates, and what a verdict will stand on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from pathlib import Path

import duckdb

from infra.errors import DataError
from pipelines.prepare.log.config import Log
from pipelines.prepare.log.files import EVENTS, ITEMS, RawFiles, quoted
from pipelines.prepare.log.ingest import RawTable, file_faults, raw_tables, typed_rows
from pipelines.prepare.log.source import split_dates

SAMPLED_ROWS = 5_000_000
"""Users are sampled above so many rows, for what needs all rows of a user."""


@dataclass(frozen=True)
class TaskProfile:
    """A task that the events tell.

    Attributes:
        positives: rows with label 1; test_positives: of the test dates.
        both: share of users with both labels, of the sample.
    """

    positives: int
    test_positives: int
    both: float


@dataclass(frozen=True)
class Profile:
    """What a log holds.

    Attributes:
        rows: events. first, last: dates. num_days: dates with events. users, items: different ones, roughly.
        train, test: first and last date of each split; None: there are too few dates.
        listed: share of events whose item is in the catalogue; None: there is no catalogue.
        cold: share of the test events whose item no earlier date has.
        ties: share of events that share user and time with another. sampled: share of users in the sample.
        tasks: by name. texts: different texts of the catalogue.
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
    sampled: float
    tasks: Mapping[str, TaskProfile]
    texts: int


def faults(config: Log, files: RawFiles, database: duckdb.DuckDBPyConnection) -> list[str]:
    """Return all that is wrong with all files, a line each."""
    return [
        fault
        for name, table in raw_tables(config).items()
        for file in files.tables[name]
        for fault in file_faults(database, table, file, config.max_dropped)
    ]


def profile(config: Log, files: RawFiles, database: duckdb.DuckDBPyConnection) -> Profile:
    """Count what a log without faults holds.

    Raises:
        DataError: it has no event.
    """
    tables = raw_tables(config)
    events = _view(database, tables[EVENTS], files.tables[EVENTS])
    days = database.execute(
        f"SELECT CAST(event_time AS DATE) AS day, count(*) FROM {events} GROUP BY day ORDER BY day"
    ).fetchall()
    if not days:
        raise DataError("prepare.source.events.path: the files hold no event")
    rows = sum(count for _, count in days)
    splits = _splits(config, [day for day, _ in days])
    count = "approx_count_distinct({})" if rows > SAMPLED_ROWS else "count(DISTINCT {})"
    users, items = database.execute(
        f"SELECT {count.format('user_key')}, {count.format('item_key')} FROM {events}"
    ).fetchall()[0]
    share = max(1, -(-rows // SAMPLED_ROWS))
    sample = f"(SELECT * FROM {events} WHERE hash(user_key) % {share} = 0)"
    ties = database.execute(
        f"SELECT coalesce(sum(n) FILTER (WHERE n > 1) / sum(n), 0) FROM"
        f" (SELECT count(*) AS n FROM {sample} GROUP BY user_key, event_time)"
    ).fetchall()[0][0]
    told = [name for name, one in config.tasks.items() if one.table is None]
    return Profile(
        rows=rows,
        first=days[0][0],
        last=days[-1][0],
        num_days=len(days),
        users=users,
        items=items,
        train=None if splits is None else splits[0],
        test=None if splits is None else splits[1],
        listed=_listed(config, files, events, database),
        cold=None if splits is None else _cold(events, splits[1], database),
        ties=float(ties),
        sampled=1 / share,
        tasks={name: _task(name, events, sample, splits, database) for name in told},
        texts=_texts(config, files, database),
    )


def _view(database: duckdb.DuckDBPyConnection, table: RawTable, files: Sequence[Path]) -> str:
    """Return the typed rows of all files, as a subquery."""
    return "(" + " UNION ALL BY NAME ".join(f"({typed_rows(database, table, file)})" for file in files) + ")"


def _splits(config: Log, days: Sequence[date]) -> tuple[tuple[date, date], tuple[date, date]] | None:
    try:
        return split_dates(config, days, datetime.combine(days[-1], time()) + timedelta(days=1))
    except DataError:
        return None


def _task(
    name: str,
    events: str,
    sample: str,
    splits: tuple[tuple[date, date], tuple[date, date]] | None,
    database: duckdb.DuckDBPyConnection,
) -> TaskProfile:
    flag = quoted(f"task:{name}")
    in_test = "false" if splits is None else f"CAST(event_time AS DATE) BETWEEN '{splits[1][0]}' AND '{splits[1][1]}'"
    positives, of_test = database.execute(
        f"SELECT coalesce(sum({flag}), 0), coalesce(sum({flag}) FILTER (WHERE {in_test}), 0) FROM {events}"
    ).fetchall()[0]
    both = database.execute(
        f"SELECT avg(CAST(low < high AS INTEGER)) FROM"
        f" (SELECT min({flag}) AS low, max({flag}) AS high FROM {sample} GROUP BY user_key)"
    ).fetchall()[0][0]
    return TaskProfile(int(positives), int(of_test), float(both or 0.0))


def _listed(config: Log, files: RawFiles, events: str, database: duckdb.DuckDBPyConnection) -> float | None:
    if config.items is None:
        return None
    items = _view(database, raw_tables(config)[ITEMS], files.tables[ITEMS])
    found = database.execute(
        f"SELECT avg(CAST(item_key IN (SELECT item_key FROM {items}) AS INTEGER)) FROM {events}"
    ).fetchall()[0][0]
    return float(found)


def _cold(events: str, test: tuple[date, date], database: duckdb.DuckDBPyConnection) -> float:
    found = database.execute(
        f"SELECT sum(n) FILTER (WHERE first >= '{test[0]}') / sum(n) FROM (SELECT"
        " min(CAST(event_time AS DATE)) AS first,"
        f" count(*) FILTER (WHERE CAST(event_time AS DATE) BETWEEN '{test[0]}' AND '{test[1]}') AS n"
        f" FROM {events} GROUP BY item_key)"
    ).fetchall()[0][0]
    return float(found or 0.0)


def _texts(config: Log, files: RawFiles, database: duckdb.DuckDBPyConnection) -> int:
    if config.items is None or not config.items.text:
        return 0
    items = _view(database, raw_tables(config)[ITEMS], files.tables[ITEMS])
    return int(database.execute(f"SELECT count(DISTINCT text) FROM {items}").fetchall()[0][0])
