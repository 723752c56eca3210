"""A small raw log as a company has it: string ids, zoned times, late labels, and an incomplete catalogue."""

import random
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FIRST = datetime(2024, 3, 1)
Row = dict[str, Any]


def raw_events(days: int, users: int = 6, items: int = 9, a_day: int = 40, seed: int = 0) -> list[Row]:
    """Return events in order of time; some share user and time, some times are equal."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for day in range(days):
        hours = sorted(rng.choice(range(0, 24 * 60, 20)) for _ in range(a_day))
        for minute in hours:
            user, item = f"u{rng.randrange(users)}", f"i{rng.randrange(items):02d}"
            at = FIRST + timedelta(days=day, minutes=minute)
            rows.append({"uid": user, "sku": item, "ts": at, "action": rng.choice(["view", "view", "click"])})
    return [
        {"eid": f"e{number}", "price": number % 7 / 2, "device": f"d{number % 3}"} | row
        for number, row in enumerate(rows)
    ]


def raw_orders(events: Sequence[Row], seed: int = 1) -> list[Row]:
    """Return orders for about half of the clicks, up to five days after the click."""
    rng = random.Random(seed)
    clicks = [row for row in events if row["action"] == "click" and rng.random() < 0.5]
    return [
        {
            "uid": row["uid"],
            "sku": row["sku"],
            "at": row["ts"] + timedelta(days=rng.uniform(0, 5)),
            "state": rng.choice("pc"),
        }
        for row in clicks
    ]


def catalogue(items: int) -> list[Row]:
    """Return items with a vector and a category."""
    return [
        {"sku": f"i{n:02d}", "vec": [float(n + 1), 1.0, float(n % 2)], "kind": f"k{n % 3}", "title": f"item {n}"}
        for n in range(items)
    ]


def write(path: Path, rows: Sequence[Row], schema: pa.Schema | None = None) -> Path:
    """Write rows as a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
    return path


EVENT_SCHEMA = pa.schema(
    {"eid": pa.string(), "price": pa.float64(), "device": pa.string(), "uid": pa.string(), "sku": pa.string(),
     "ts": pa.timestamp("ns", tz="UTC"), "action": pa.string()}
)  # fmt: skip


def write_days(folder: Path, rows: Sequence[Row], schema: pa.Schema = EVENT_SCHEMA) -> None:
    """Write events, one file per day, with zoned times in nanoseconds."""
    for day in sorted({row["ts"].date() for row in rows}):
        own = [row | {"ts": row["ts"].replace(tzinfo=UTC)} for row in rows if row["ts"].date() == day]
        write(folder / f"dt={day}" / "part.parquet", own, schema)


def log_config(folder: Path, **values: Any) -> dict[str, Any]:
    """Return the prepare section for the log in a folder."""
    source: dict[str, Any] = {
        "kind": "log",
        "events": {
            "path": f"{folder}/events", "user": "uid", "item": "sku", "time": "ts", "event_id": "eid",
            "dense": ["price"], "categoricals": ["device"],
        },
        "items": {"path": f"{folder}/items.parquet", "id": "sku", "embeddings": ["vec"], "categoricals": ["kind"]},
        "labels": {"orders": {"path": f"{folder}/orders.parquet", "user": "uid", "item": "sku", "time": "at"}},
        "tasks": {
            "click": {"where": "action = 'click'"},
            "order": {"given": "click", "table": "orders", "where": "state = 'p'", "within_days": 2},
        },
        "max_history": 4,
        "count_days": 2,
        "max_unknown_items": 0.5,
    } | values  # fmt: skip
    as_of: date | None = source.pop("as_of", None)
    return {"source": source, "cache_dir": f"{folder}/cache"} | ({"as_of": str(as_of)} if as_of else {})


def write_log(folder: Path, days: int, listed: int = 7, **sizes: int) -> list[Row]:
    """Write a whole log, and return its events; the last items are missing from the catalogue."""
    events = raw_events(days, **sizes)
    write_days(folder / "events", events)
    write(folder / "items.parquet", catalogue(listed))
    write(folder / "orders.parquet", raw_orders(events))
    return events
