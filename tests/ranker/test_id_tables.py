"""The description of an arm's tables, compared with a slow count."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.features import arm_features
from sidestack.ranker.id_tables import DistinctIds, collision_share, describe_tables
from sidestack.ranker.reader import Split
from tests.datasets import joined
from tests.ranker.dataset import SIDS, SPEC, write_dataset
from tests.ranker.training import config_of, config_with


def slow_share(ids: set[int], rows: int) -> float:
    by_row = Counter(id % rows for id in ids)
    return sum(by_row[id % rows] > 1 for id in ids) / len(ids) if ids else 0.0


@given(st.sets(st.integers(0, 2**62), max_size=60), st.integers(1, 80))
def test_collision_share_matches_a_slow_count(ids: set[int], rows: int) -> None:
    assert collision_share(np.array(sorted(ids), np.int64), rows) == pytest.approx(slow_share(ids, rows))


def test_distinct_ids_of_many_parts_are_their_union(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 3_000_000, 400_000) for _ in range(8)]  # merged in several rounds
    distinct = DistinctIds()
    for part in parts:
        distinct.add(pa.array(part))
    distinct.add(pa.array([7, 3_000_001, 7]))
    assert np.array_equal(distinct.ids(), np.unique(np.concatenate([*parts, [7, 3_000_001]])))
    assert len(DistinctIds().ids()) == 0


@pytest.mark.parametrize("impressions", [1, 3])
def test_tables_are_described_by_the_ids_of_the_impressions(tmp_path: Path, impressions: int) -> None:
    path = write_dataset(tmp_path / "dataset", rows_a_day=256, impressions=impressions)
    dataset = read_dataset(path)
    config = config_with(
        {"item": "sid_ngram", "history": "sid_ngram", "max_rows": 50},
        model={"table_rows": {"user_id": 7, "item_id": 50, "history_item_ids": 64, "topics": 4, "slot": 30}},
    )
    features = arm_features(dataset.spec, config, SIDS)
    dates = ((SPEC.train[0], SPEC.train[0]), SPEC.test)
    trained, held_out = (Split(part, dataset, features) for part in dates)
    described = describe_tables(trained, held_out, 8)
    assert described["rows_counted"] == 256
    events, later = (joined(path, None, *part) for part in dates)
    tables = {table["table"]: table for table in described["tables"]}
    assert len(tables) == 4 + 1 + 3 + 3
    for name, table in tables.items():
        ids = set(ids_of(events, name))
        assert table["distinct_ids"] == len(ids)
        looked_up = ids_of(later, name)
        assert table["held_out_ids"] == len(looked_up)
        assert table["never_seen"] == sum(id not in ids for id in looked_up)
        assert table["bytes"] == table["rows"] * 8 * 4
        assert table["is_sid"] == ("sid" in name)
        expected = slow_share(ids, table["rows"]) if table["rows"] < table["possible_ids"] else 0.0
        assert table["collision_share"] == pytest.approx(expected)
    sizes = {name: (tables[name]["possible_ids"], tables[name]["rows"]) for name in ("t_user_id", "t_topics", "t_slot")}
    assert sizes == {"t_user_id": (60, 7), "t_topics": (11, 4), "t_slot": (5, 30)}
    assert tables["t_topics"]["collision_share"] == 1.0 > tables["t_slot"]["collision_share"] == 0.0
    assert 0 < tables["t_item_id"]["never_seen"] < tables["t_item_id"]["held_out_ids"] == 2 * 256
    assert tables["t_item_sid"]["possible_ids"] == 3**6
    assert tables["t_item_sid"]["rows"] == 50
    assert tables["t_item_sid"]["collision_share"] > 0.9
    assert tables["t_item_sid_prefix_2"]["collision_share"] == 0.0


def ids_of(events: pa.Table, table: str) -> list[int]:
    values = events[table.removeprefix("t_")].to_pylist()
    return [id for value in values for id in (value if isinstance(value, list) else [value]) if id is not None]


def test_rows_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    dataset = read_dataset(write_dataset(tmp_path / "dataset", rows_a_day=512))
    split = Split(SPEC.train, dataset, arm_features(SPEC, config_of("none"), {}))
    assert describe_tables(split, split, 8, max_rows=600)["rows_counted"] == 5 * 128  # of 16 row groups
