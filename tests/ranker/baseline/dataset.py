"""The ranker's small dataset with categories, a sparse column of many ids, requests, and two days until conversions."""

from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidestack.infra.tables import DatasetSpec
from tests.datasets import write_snapshot_of
from tests.ranker.dataset import SPEC as PLAIN
from tests.ranker.dataset import all_days, events, in_requests, items

SPEC: DatasetSpec = PLAIN.model_copy(
    update={
        "categoricals": {"brand": 5},
        "sparse": {"slot": 5},
        "request_sparse": {"topics": 300},
        "dense": ("rank",),
        "request_dense": ("price",),
        "followup_days": {"conversion": 2.0},
    }
)
NUM_USERS, NUM_ITEMS = 12, 30
"""Users and items that occur in the log."""


def days(rows_a_day: int = 60) -> dict[date, pa.Table]:
    """Draw the six days, two impressions per request, with few users and items that recur often."""
    rng = np.random.default_rng(3)
    digits_ID = np.tile(rng.integers(0, 3, (NUM_ITEMS, 6)), (SPEC.num_items // NUM_ITEMS, 1))
    drawn = {}
    for day in all_days():
        rows = events(rng, day, rows_a_day, digits_ID)
        for name, number in (("user_id", NUM_USERS), ("item_id", NUM_ITEMS)):
            rows = with_column(rows, name, pa.array(rows[name].to_numpy() % number))
        drawn[day] = in_requests(rows, day, 2)
    return drawn


def brands() -> pa.Array:
    """Return the items' brands; every ninth item has none."""
    item_I = np.arange(SPEC.num_items)
    return pa.array((item_I % 5).astype(np.int32), mask=item_I % 9 == 0)


def write(path: Path, given: dict[date, pa.Table]) -> Path:
    """Write the days, with the items' embeddings and brands."""
    return write_snapshot_of(path, SPEC, [items().append_column("brand", brands())], [], given)


def with_column(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """Return rows with the values of a column replaced."""
    at = rows.schema.get_field_index(name)
    return rows.set_column(at, rows.schema.field(at), values)
