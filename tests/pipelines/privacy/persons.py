"""A raw log with searchable ids of persons, and a search for them in the raw bytes and decoded Parquet of all files."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.pipelines.prepare.log.raw import (
    EVENT_SCHEMA,
    Row,
    catalogue,
    log_config,
    raw_events,
    raw_orders,
    write,
    write_days,
)

ENV = "SIDESTACK_TEST_ID_KEY"
KEY = "0123456789abcdef0123456789abcdef-secret"
SCHEMA = pa.schema([*EVENT_SCHEMA, ("email", pa.string()), ("session", pa.string())])


def person(uid: str) -> str:
    """Return a searchable id of a user."""
    return f"person-{uid}@mail.example"


def product(sku: str) -> str:
    """Return a searchable id of an item."""
    return f"product:{sku}:catalogue"


def write_persons(folder: Path, days: int, items: int = 9, **sizes: int) -> list[Row]:
    """Write a log of persons, with orders, catalogue and users, and return its events."""
    rows = raw_events(days, items=items, **sizes)
    events = [
        {
            **row, "uid": person(row["uid"]), "sku": product(row["sku"]), "eid": f"event<{row['eid']}>",
            "email": f"secret-{row['uid']}@home.example", "session": f"session<{row['uid']}-{row['ts'].timestamp()}>",
        }
        for row in rows
    ]  # fmt: skip
    write_days(folder / "events", events, SCHEMA)
    write(folder / "items.parquet", [{**row, "sku": product(row["sku"])} for row in catalogue(items)])
    write(folder / "orders.parquet", raw_orders(events))
    users = sorted({row["uid"] for row in events})
    write(folder / "users.parquet", [{"uid": uid, "plan": f"plan{n % 2}"} for n, uid in enumerate(users)])
    return events


def persons_config(folder: Path, **values: Any) -> dict[str, Any]:
    """Return the prepare section for the log of persons, with all ids masked."""
    config = log_config(folder, **{"privacy": {"key": {"env": ENV}, "mask_items": True}, **values})
    config["source"]["users"] = {"path": f"{folder}/users.parquet", "id": "uid", "categoricals": ["plan"]}
    config["source"]["events"]["request"] = "session"
    return config


def secrets(events: Iterable[Row]) -> list[str]:
    """Return all texts that no output may contain: raw ids, values of columns that are not configured, and the key."""
    columns = ("uid", "sku", "eid", "session", "email")
    return sorted({row[column] for row in events for column in columns} | {KEY})


def leaks(folder: Path, wanted: Iterable[str]) -> list[tuple[str, str]]:
    """Return the files below a folder that contain any of the texts, each with the first text found."""
    texts = [text.encode() for text in wanted]
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = b"\n".join(_contents(file))
        found += [(str(file.relative_to(folder)), text.decode()) for text in texts if text in content][:1]
    return found


def _contents(file: Path) -> Iterator[bytes]:
    yield file.read_bytes()
    yield file.name.encode()
    if file.suffix == ".parquet":
        table = pq.read_table(file, partitioning=None)
        for column in table.columns:
            yield repr(column.unique().to_pylist() if pa.types.is_string(column.type) else column.to_pylist()).encode()
