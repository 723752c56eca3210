"""Draw a small synthetic dataset of joined impressions, and specify it with two tasks or a chain of three tasks."""

from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from sidestack.infra.tables import DatasetSpec, TaskSpec, flat_schema

TWO_TASKS = DatasetSpec(
    embeddings={"vector": 2},
    categoricals={"brand": 3},
    user_categoricals={"age": 4},
    num_items=10,
    num_users=5,
    tasks={"click": TaskSpec(), "conversion": TaskSpec(given="click")},
    dense=("popularity",),
    sparse={"store": 7},
    max_history=3,
    train=(date(2020, 1, 1), date(2020, 1, 2)),
    test=(date(2020, 1, 3), date(2020, 1, 3)),
    origin="made up",
)
SPEC = TWO_TASKS.model_copy(
    update={
        "tasks": {"click": TaskSpec(), "cart": TaskSpec(given="click"), "buy": TaskSpec(given="cart")},
        "request_dense": ("hour",),
        "request_sparse": {"query": 9},
    }
)
DAYS = [date(2020, 1, 1) + timedelta(days=n) for n in range(3)]


def requests(day: date, sizes: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Draw a date's joined impressions as dictionaries; `sizes` are the numbers of impressions of its requests."""
    rng = np.random.default_rng([seed, day.toordinal()])
    rows: list[dict[str, Any]] = []
    for number, size in enumerate(sizes):
        at = datetime(day.year, day.month, day.day) + timedelta(seconds=number)
        length = int(rng.integers(4))
        of_request = {
            "request_id": 100 * day.day + number,
            "user_id": int(rng.integers(5)),
            "event_time": at,
            "hour": float(rng.integers(24)),
            "query": rng.integers(9, size=rng.integers(3)).tolist(),
            "history_item_ids": rng.integers(10, size=length).tolist(),
            "history_times": [at - timedelta(hours=length - n) for n in range(length)],
        }
        for _ in range(size):
            click, cart, buy = (int(one) for one in rng.integers(2, size=3))
            rows.append({
                **of_request,
                "item_id": int(rng.integers(10)),
                "popularity": float(rng.integers(8)),
                "store": rng.integers(7, size=rng.integers(3)).tolist(),
                "click": click, "cart": click * cart, "buy": None if rng.random() < 0.3 else click * cart * buy,
            })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows of dictionaries as a table."""
    return pa.Table.from_pylist(rows, schema=flat_schema(SPEC))
