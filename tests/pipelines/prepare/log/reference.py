"""The rows of a log computed by slow, plain loops, as a reference for the SQL."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from tests.pipelines.prepare.log.raw import Row


def reference_rows(
    events: Sequence[Row],
    orders: Sequence[Row],
    kinds: dict[str, str],
    *,
    end: datetime,
    max_history: int = 4,
    count_days: int = 2,
    delay: timedelta = timedelta(),
) -> dict[str, Row]:
    """Return the expected row by event id, with keys in place of ids: counts, history, labels."""
    events = [row for row in events if row["ts"] < end]
    return {row["eid"]: _row(row, events, orders, kinds, end, max_history, count_days, delay) for row in events}


def _row(
    row: Row,
    events: Sequence[Row],
    orders: Sequence[Row],
    kinds: dict[str, str],
    end: datetime,
    max_history: int,
    count_days: int,
    delay: timedelta,
) -> Row:
    known = [one for one in events if one["ts"] < row["ts"] - delay]
    recent = [one for one in known if one["ts"] >= row["ts"] - timedelta(days=count_days)]
    found: dict[str, Any] = {"click": int(row["action"] == "click"), "price": row["price"]}
    kind = kinds.get(row["sku"])
    same = {
        "user": lambda one: one["uid"] == row["uid"],
        "item": lambda one: one["sku"] == row["sku"],
        "user_category": lambda one: kind is not None and one["uid"] == row["uid"] and kinds.get(one["sku"]) == kind,
    }
    for name, is_same in same.items():
        for window, seen in (("", known), (f"_{count_days}d", recent)):
            own = [one for one in seen if is_same(one)]
            found[f"{name}_events{window}"] = float(len(own))
            found[f"{name}_positives{window}"] = float(sum(one["action"] == "click" for one in own))
        positives = found[f"{name}_positives"]
        found[f"{name}_log_odds"] = math.log((positives + 1) / (found[f"{name}_events"] - positives + 1))
    clicks = sorted((one["ts"], one["sku"]) for one in known if one["uid"] == row["uid"] and one["action"] == "click")[
        -max_history:
    ]
    found["history"] = [(sku, at) for at, sku in clicks]
    found["order"] = _order(row, orders, end)
    return found


def _order(row: Row, orders: Sequence[Row], end: datetime) -> int | None:
    within = timedelta(days=2)
    if row["ts"] + within >= end:
        return None
    if row["action"] != "click":
        return 0
    own = [one for one in orders if (one["uid"], one["sku"], one["state"]) == (row["uid"], row["sku"], "p")]
    return int(any(row["ts"] <= one["at"] < row["ts"] + within for one in own))
