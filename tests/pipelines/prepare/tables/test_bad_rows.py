"""Wrong rows in a user's own tables are refused with file, column and rule."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.pipelines.prepare.growing import Change, read, with_column, with_value
from tests.pipelines.prepare.tables.folder import EVENTS, ITEMS, USERS, assert_refused, change_rows


def late_history(content: pa.Table) -> pa.Table:
    event = content["event_time"][30].as_py()
    return with_value("history_times", 30, [*content["history_times"][30].as_py()[:-1], event])(content)


def null_in_history(content: pa.Table) -> pa.Table:
    """Put in a null as the newest entry, which would hide an entry of the future from the check of times."""
    times = content["history_times"][30].as_py()
    late = np.datetime64("2030-01-01", "us").astype(object)
    return with_value("history_times", 30, [late, *times[1:-1], None])(content)


def reversed_history(content: pa.Table) -> pa.Table:
    return with_value("history_times", 30, content["history_times"][30].as_py()[::-1])(content)


def shorter_history(content: pa.Table) -> pa.Table:
    return with_value("history_item_ids", 30, content["history_item_ids"][30].as_py()[:-1])(content)


def conversions_without_click(content: pa.Table) -> pa.Table:
    return with_column("conversion", lambda values: [1 - click for click in content["click"].to_pylist()])(content)


def scaled(name: str, factor: float) -> Change:
    def change(values: list[Any]) -> list[Any]:
        return [value and (np.array(value, np.float32) * factor).tolist() for value in values]

    return with_column(name, change, pa.list_(pa.float32()))


BAD_ROWS: dict[str, tuple[str, Change, str]] = {
    "missing column": (EVENTS, lambda t: t.drop_columns(["slot"]), r"column 'slot' is missing"),
    "missing label": (EVENTS, lambda t: t.drop_columns(["click"]), r"column 'click' is missing"),
    "missing signal": (ITEMS, lambda t: t.drop_columns(["brand"]), r"column 'brand' is missing"),
    "missing id": (ITEMS, lambda t: t.drop_columns(["item_id"]), r"column 'item_id' is missing; expected type int64"),
    "wrong type": (
        EVENTS, with_column("click", list, pa.int64()), r"row group 0: column 'click' has type int64, must be int8"
    ),
    "wrong type of request": (
        EVENTS, with_column("request_id", lambda ids: [str(one) for one in ids], pa.string()),
        r"column 'request_id' has type string, must be int64",
    ),
    "label of 2": (EVENTS, with_value("click", 30, 2), r"row group 1: column 'click': label 2 is not 0 or 1"),
    "conversion of -1": (EVENTS, with_value("conversion", 30, -1), r"column 'conversion': label -1"),
    "conversion without a click": (
        EVENTS, conversions_without_click, r"column 'conversion': must not be 1 where 'click' is 0"
    ),
    "null time": (EVENTS, with_value("event_time", 45, None), r"row group 2: column 'event_time': must not be null"),
    "unknown item": (
        EVENTS, with_value("item_id", 30, 60),
        r"column 'item_id': id 60 is outside the table \[0, 60\)",
    ),
    "unknown user": (
        EVENTS, with_value("user_id", 30, -1),
        r"column 'user_id': id -1 is outside the table \[0, 20\)",
    ),
    "unknown slot": (EVENTS, with_value("slot", 30, [6]), r"column 'slot': id 6 is outside the table \[0, 6\)"),
    "null in a list": (EVENTS, with_value("slot", 30, [None]), r"column 'slot': must hold no null"),
    "dense NaN": (EVENTS, with_value("item_rank", 30, float("nan")), r"column 'item_rank': must be finite"),
    "unknown item in history": (EVENTS, with_value("history_item_ids", 30, [99] * 16), r"'history_item_ids': id 99"),
    "late history": (
        EVENTS, late_history,
        r"row group 1: column 'history_times': must lie strictly before event_time",
    ),
    "no id at all": (
        USERS, with_column("user_id", lambda ids: [None] * len(ids)), r"column 'user_id': must not be null; is null in"
    ),
    "null in history": (EVENTS, null_in_history, r"column 'history_times': must hold no null inside a list"),
    "newest first": (EVENTS, reversed_history, r"column 'history_times': must be oldest first"),
    "uneven history": (EVENTS, shorter_history, r"must have as many entries as history_item_ids"),
    "other day": (
        EVENTS, with_value("event_time", 49, np.datetime64("2024-01-03", "us")),
        r"'event_time': must lie on 2024-01-02",
    ),
    "NaN in an embedding": (
        ITEMS, with_value("text_embedding", 30, [float("nan")] * 32),
        r"'text_embedding': must be finite",
    ),
    "embedding beyond half precision": (
        ITEMS, scaled("text_embedding", 1e6), r"'text_embedding': .*largest number of an embedding is .*e\+05; .*scale"
    ),
    "embedding below half precision": (
        ITEMS, scaled("text_embedding", 1e-9), r"'text_embedding': .*largest number of an embedding is .*e-10; .*scale"
    ),
    "gap in the ids": (
        ITEMS, lambda t: pa.concat_tables([t.slice(0, 30), t.slice(31)]),
        r"column 'item_id': new ids must continue from 0 without a gap; 30 is expected, 31 is there",
    ),
    "ids out of order": (
        ITEMS, lambda t: pa.concat_tables([t.slice(30), t.slice(0, 30)]),
        r"column 'item_id': (ids must rise|new ids must continue)",
    ),
    "unknown category": (
        ITEMS, with_value("category", 30, 16),
        r"column 'category': id 16 is outside the table \[0, 16\)",
    ),
    "unknown segment": (USERS, with_value("segment", 3, 12), r"column 'segment': id 12"),
    "user twice": (
        USERS, lambda t: pa.concat_tables([t, t.slice(0, 1)]), r"column 'user_id': ids must rise; 0 follows 19"
    ),
    "short embedding": (
        ITEMS,
        with_column("text_embedding", lambda values: [value and value[:3] for value in values], pa.list_(pa.float32())),
        r"'text_embedding': embeddings must have 32 numbers; found lengths \[3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_refused(kind: str, own: Path) -> None:
    name, change, message = BAD_ROWS[kind]
    change_rows(own, name, change)
    assert str(own / name) in assert_refused(own, message)


@pytest.mark.parametrize("zone", ["Asia/Kolkata", "America/Los_Angeles"])
def test_late_history_entry_is_reported_by_its_stored_time_in_any_time_zone(
    zone: str, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_rows(own, EVENTS, late_history)
    at = read(own / EVENTS)["event_time"][30].as_py()
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert_refused(own, f"row 10 has an entry at {at}")
    finally:
        monkeypatch.undo()
        time.tzset()
