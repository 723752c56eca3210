"""The cost of an arm's columns, compared with a slow count of the files' own metadata."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.cost import column_cost, embedding_bytes, mean_entries
from sidestack.ranker.features import arm_features
from tests.datasets import file_of, joined
from tests.ranker.dataset import REQUEST_SPEC, SIDS, SPEC, all_days, write_dataset
from tests.ranker.training import config_with

DAYS = all_days()[:3]
DATES = (DAYS[0], DAYS[-1])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cost") / "dataset", rows_a_day=300, impressions=7)


def stored_bytes(files: list[Path], column: str) -> tuple[int, int]:
    """Return a column's compressed and uncompressed bytes, summed over the files."""
    compressed = uncompressed = 0
    for file in files:
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            for leaf in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(leaf)
                if chunk.path_in_schema in (column, f"{column}.list.element"):
                    compressed += chunk.total_compressed_size
                    uncompressed += chunk.total_uncompressed_size
    return compressed, uncompressed


def test_column_cost_divides_columns_of_requests_among_their_impressions(dataset: Path) -> None:
    sids = read_dataset(dataset).snapshot.sids["sid"]
    where = {
        "item_id": "events", "slot": "events", "price": "requests", "history_item_ids": "requests", "click": "labels",
        "item_sid_prefix_2": sids.table("sid", "events"), "history_sids": sids.table("sid", "requests"),
    }  # fmt: skip
    counted = {
        name: stored_bytes([file_of(dataset, table, day) for day in DAYS], name) for name, table in where.items()
    }
    for columns in (*((name,) for name in where), tuple(where), ("history_sids", "item_sid_prefix_2")):
        # Each request has its own impressions, so all files' bytes are divided by all files' impressions.
        expected = [sum(counted[name][kind] for name in columns) / (3 * 300) for kind in (0, 1)]
        assert tuple(column_cost(read_dataset(dataset), DATES, columns)) == pytest.approx(expected)
        assert min(expected) > 0
    assert tuple(column_cost(read_dataset(dataset), DATES, ())) == (0, 0)


def test_column_cost_samples_evenly_spaced_files_when_there_are_many(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidestack.ranker.cost.MAX_FILES", 2)
    for column, table in (("item_id", "events"), ("history_times", "requests")):
        compressed, uncompressed = stored_bytes([file_of(dataset, table, day) for day in (DAYS[0], DAYS[2])], column)
        expected = (compressed / 600, uncompressed / 600)
        assert tuple(column_cost(read_dataset(dataset), DATES, (column,))) == pytest.approx(expected)


@pytest.mark.parametrize("impressions", [1, 7])
def test_embedding_bytes_are_those_of_the_item_and_a_share_of_history_and_user(
    tmp_path: Path, impressions: int
) -> None:
    path = write_dataset(tmp_path / "dataset", rows_a_day=300, impressions=impressions)
    spec = SPEC if impressions == 1 else REQUEST_SPEC
    spec = spec.model_copy(update={"user_embeddings": {"activity": 4}})
    rows = joined(path, ["request_id", "history_item_ids"], *DATES)
    starts = [0, *(row for row in range(1, 900) if rows["request_id"][row] != rows["request_id"][row - 1])]
    lengths = pc.list_value_length(rows["history_item_ids"].take(pa.array(starts))).to_pylist()
    entries = sum(max(1, length) for length in lengths)  # an empty list counts as one
    assert len(starts) == (900 if impressions == 1 else 3 * -(-300 // 7))
    item, user = 2 * (6 + 4), 2 * 4
    for arm, expected in (
        ({}, 0.0),
        ({"item": "dense"}, item),
        ({"user": "dense"}, user * len(starts) / 900),
        ({"history": "dense"}, item * entries / 900),
        ({"item": "dense", "history": "dense", "user": "dense"}, item + (item * entries + user * len(starts)) / 900),
    ):
        features = arm_features(spec, config_with(arm), SIDS)
        assert embedding_bytes(features, read_dataset(path), DATES) == pytest.approx(expected)
    assert mean_entries(read_dataset(path), DATES, "history_item_ids") == pytest.approx(entries / len(starts))
