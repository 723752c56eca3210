"""Preparing a raw log: seconds and memory for the whole log, for an added day, and for checking the log.

`python -m benchmarks.raw_log [--quick] [--out DIR]`. DuckDB writes the log, one file per day: string ids, times in
seconds, a catalogue with a vector and a category, late orders. It is read with `prepare.source.kind: log`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb

from sidestack.benchmarks.goals import goal, publish
from sidestack.benchmarks.items import ALONE
from sidestack.benchmarks.record import Row, results_folder
from sidestack.benchmarks.timing import Spread, own_peak_bytes
from sidestack.infra.commit import committing
from sidestack.infra.config import parse, plain
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.check.profile import faults, profile
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.log.files import raw_files
from sidestack.pipelines.prepare.log.on_duckdb import database
from sidestack.pipelines.prepare.log.source import Log
from sidestack.pipelines.prepare.stage import prepare

FIRST = date(2024, 1, 1)
WORDS = """
Events of a tenth as many users and a hundredth as many items, 5 % of them clicks, orders of clicks within three days;
32 entries of history, counts of seven days. "whole log" is the first prepare: ingest, numbering, every date's rows,
written and committed. "a day added" is the next night's prepare, labels of three days matured. "check" is what
`python -m pipelines.check` does. Memory is the process's largest so far. All cores of the machine are used.
"""
COLUMNS = {"what": "", "events": ",d", "days": ",d", "seconds": ".1f", "peak_mib": ",.0f"}


@dataclass(frozen=True)
class Sizes:
    """Events of the log to prepare and of the larger log to check, and days of both."""

    events: int
    looked_at: int
    days: int


FULL = Sizes(events=10_000_000, looked_at=100_000_000, days=20)
QUICK = Sizes(events=20_000, looked_at=40_000, days=6)
CHECK_SECONDS = 20


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.raw_log", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small logs, to see that it runs")
    parser.add_argument("--out", type=Path, help="where raw_log.json and raw_log.md go")
    arguments = parser.parse_args()
    out = results_folder(arguments.out, quick=arguments.quick)
    with tempfile.TemporaryDirectory(prefix="sidestack-raw-") as folder:
        rows = measured(Path(folder), QUICK if arguments.quick else FULL)
    publish("raw_log", "A raw log", WORDS, [*rows, *goals(rows)], COLUMNS, packages=["duckdb", "pyarrow"], out=out)


def measured(folder: Path, sizes: Sizes) -> list[Row]:
    """Prepare a log, then the same log with one more day; check it, and a larger log."""
    raw = folder / "raw"
    write_log(raw, sizes.events, sizes.days)
    found = [
        timed("whole log", sizes.events, sizes.days, lambda: run(raw, folder / "runs/first", sizes.days)),
        timed("a day added", sizes.events // sizes.days, 1, lambda: run(raw, folder / "runs/second", sizes.days + 1)),
        timed("check", sizes.events, sizes.days + 1, lambda: check_log(raw)),
    ]
    larger = folder / "larger"
    write_log(larger, sizes.looked_at, sizes.days)
    return [*found, timed("check", sizes.looked_at, sizes.days + 1, lambda: check_log(larger))]


def timed(what: str, events: int, days: int, call: Callable[[], None]) -> Row:
    """Return the size of a call's input, its seconds, and the process's peak memory after it."""
    began = time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    return {"what": what, "events": events, "days": days, "seconds": seconds, "peak_mib": own_peak_bytes() / 2**20}


def write_log(folder: Path, events: int, days: int) -> None:
    """Write `events` events over `days` dates, and the events of one more date."""
    (folder / "events").mkdir(parents=True)
    users, items, a_day = max(events // 10, 10), max(events // 100, 10), events // days
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        for day in range(days + 1):
            drawn = ", ".join(
                f"hash(i, {day}, {number}) % {most} AS {name}"
                for number, (name, most) in enumerate({"u": users, "n": items, "s": 86400}.items())
            )
            rows = f"""
                SELECT concat('e', {day}, '-', i) AS event_id, concat('u', u) AS user_id,
                    concat('item', n * n % {items}) AS item_id,
                    CAST('{FIRST + timedelta(days=day)}' AS TIMESTAMP) + to_seconds(s::BIGINT) AS time,
                    hash(i, {day}, 4) % 20 = 0 AS clicked, concat('d', hash(i, {day}, 5) % 4) AS device
                FROM (SELECT i, {drawn} FROM range({a_day}) AS t(i)) ORDER BY time"""
            connection.execute(f"COPY ({rows}) TO '{folder}/events/{FIRST + timedelta(days=day)}.parquet'")
        connection.execute(
            f"COPY (SELECT concat('item', i) AS item_id, [random() - 0.5 for k in range(16)]::FLOAT[] AS vector,"
            f" concat('c', i % 50) AS category FROM range({items}) AS t(i)) TO '{folder}/items.parquet'"
        )
        connection.execute(
            f"COPY (SELECT user_id, item_id, time + to_hours((hash(event_id) % 100)::BIGINT) AS time FROM"
            f" read_parquet('{folder}/events/*.parquet') WHERE clicked AND hash(event_id, 1) % 4 = 0)"
            f" TO '{folder}/orders.parquet'"
        )


def config_of(raw: Path, days: int) -> PrepareConfig:
    """Return the configuration of the log's first days."""
    source: dict[str, Any] = {
        "kind": "log",
        "events": {"path": f"{raw}/events", "user": "user_id", "item": "item_id", "time": "time",
                   "event_id": "event_id", "categoricals": ["device"]},
        "items": {"path": f"{raw}/items.parquet", "id": "item_id", "embeddings": ["vector"],
                  "categoricals": ["category"]},
        "labels": {"orders": {"path": f"{raw}/orders.parquet", "user": "user_id", "item": "item_id", "time": "time"}},
        "tasks": {"click": {"where": "clicked"}, "order": {"given": "click", "table": "orders", "within_days": 3}},
    }  # fmt: skip
    values = {"source": source, "as_of": FIRST + timedelta(days=days), "cache_dir": str(raw / "cache")}
    return parse(PrepareConfig, values, "prepare")


def run(raw: Path, out: Path, days: int) -> None:
    """Run stage `prepare`."""
    config = config_of(raw, days)
    with committing(out, ALONE, stage="prepare") as staging:
        prepare(StageRun(config, {}, staging, ALONE, RunLog.open(0, "prepare", staging, plain(config), {}, "", None)))


def check_log(raw: Path) -> None:
    """Check a log as `pipelines.check` does."""
    source = config_of(raw, 0).source
    assert isinstance(source, Log)
    files = raw_files(source, raw / "ledger.json")
    with database(raw) as connection:
        assert faults(source, files, connection) == []
        profile(source, files, connection)


def goals(rows: list[Row]) -> list[Row]:
    """Compare the check of the larger log with its goal, and a day's seconds with its share of the log's."""
    whole, day, _, look_at = rows
    ratio = CHECK_SECONDS / look_at["seconds"]
    share = whole["seconds"] / whole["days"] / day["seconds"]
    return [
        goal(f"check of {look_at['events']:,} events in {CHECK_SECONDS} s", Spread(ratio, ratio, ratio), 1.0),
        goal("a day of the whole log / a day added", Spread(share, share, share), 0.1),
    ]


if __name__ == "__main__":
    main()
