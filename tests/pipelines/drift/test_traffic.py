"""Impressions of new items and users against a slow count, including the first new id."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest

from sidestack.infra.snapshot import read_dataset
from sidestack.infra.tables import Entity
from sidestack.pipelines.drift.dates import Dates
from sidestack.pipelines.drift.traffic import newcomers
from tests.datasets import joined
from tests.encoder.fabricated import DAYS, SPEC, events, replaced, write_dataset

KNOWN: dict[Entity, int] = {"item": 600, "user": 31}


def with_first_new(day: date) -> pa.Table:
    """Return impressions whose first row is of the first new item."""
    table = events(day)
    return replaced(table, "item_id", pa.array([KNOWN["item"], *table["item_id"].to_pylist()[1:]]))


def test_newcomers_are_the_ids_missing_from_the_earlier_table(tmp_path: Path) -> None:
    now = read_dataset(write_dataset(tmp_path / "now", days={day: with_first_new(day) for day in DAYS}))
    spec = SPEC.model_copy(update={"num_items": KNOWN["item"], "num_users": KNOWN["user"]})
    found = newcomers(now, replace(now, spec=spec), Dates(new=DAYS, earlier=()))
    rows = joined(now.path, ["item_id", "user_id"])
    assert KNOWN["user"] in rows["user_id"].to_pylist()
    for entity, known in KNOWN.items():
        shown = rows[f"{entity}_id"].to_pylist()
        assert found[entity].of_impressions == sum(value >= known for value in shown) / len(shown)
        assert found[entity].of_table == pytest.approx({"item": 100 / 700, "user": 9 / 40}[entity])
