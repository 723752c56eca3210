"""Predictions sorted on disk: in every order, independent of the order of writing, and in bounded memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.errors import DataError
from sidestack.infra.parquet_writer import TableWriter
from sidestack.ranker import predictions as module
from sidestack.ranker.metric_registry import Order
from sidestack.ranker.predictions import require_same_rows, sorted_predictions, sorting

TASKS = ("view", "order", "refund")
"""A chain; `order` is a word of SQL."""


def drawn(rows: int = 500, seed: int = 0) -> pa.Table:
    """Draw rows in random order, with ties of scores and unknown labels."""
    rng = np.random.default_rng(seed)
    view = (rng.random(rows) < 0.5).astype(np.int8)
    order = view & (rng.random(rows) < 0.5)
    columns = {
        "row": rng.permutation(rows) + 7,
        "user_id": rng.integers(0, 20, rows) * 10**9,
        "item_id": rng.integers(0, 30, rows),
        "view": view,
        "order": pa.array(order.astype(np.int8), mask=view == 0),
        "refund": pa.array(np.zeros(rows, np.int8), mask=np.ones(rows, bool)),
    }
    scores = {f"p_{task}": np.round(rng.random(rows), 1).astype(np.float32) for task in TASKS}
    return pa.table({**columns, **scores})


def write(path: Path, table: pa.Table, ranks: int = 3, group_rows: int = 64) -> Path:
    for rank in range(ranks):
        part = table.take(np.arange(rank, table.num_rows, ranks))
        with TableWriter(
            path / f"predictions/part-{rank:05d}.parquet", table.schema, row_group_rows=group_rows
        ) as writer:
            writer.write(part)
    return path


@pytest.mark.parametrize(
    ("order", "keys"),
    [("row", ("row",)), ("score", ("p_order", "row")), ("user", ("user_id", "p_order"))],
)
@pytest.mark.parametrize("batch_rows", [64, 1 << 16])
def test_judged_rows_are_read_in_every_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Order, keys: tuple[str, ...], batch_rows: int
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", batch_rows)
    table = drawn()
    judged = table.filter(table["order"].is_valid()).sort_by([(key, "ascending") for key in keys])
    users = sorted(set(judged["user_id"].to_pylist()))
    with sorting(tmp_path) as database, sorted_predictions(write(tmp_path / "a", table), TASKS, database) as found:
        assert len(found) == 500 and found.count_users() == len(set(table["user_id"].to_pylist()))
        assert found.count_labels("order") == (judged.num_rows, sum(judged["order"].to_pylist()))
        assert found.users("order").tolist() == users
        batches = list(found.judged("order", order))
        assert len(batches) == 1 or batch_rows == 64
        for name, of_batches in {
            "user_id": [users[place] for rows in batches for place in rows.users_M],
            "p_order": [score for rows in batches for score in rows.scores_M],
        }.items():
            assert of_batches == judged[name].to_pylist()
        if order != "user":  # the order within a user's tie is arbitrary
            assert [item for rows in batches for item in rows.ids["item"]] == judged["item_id"].to_pylist()
            assert [label for rows in batches for label in rows.labels_M] == judged["order"].to_pylist()
        assert found.users("refund").tolist() == list(found.judged("refund", order)) == []
        assert found.count_labels("refund") == (0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_rows_of_two_arms_are_compared(tmp_path: Path) -> None:
    table = drawn()
    at = int(np.flatnonzero(np.array(table["view"]) == 0)[0])
    row = table["row"][at].as_py()
    labels = table["order"].to_pylist()
    labels[at] = 1
    odd = table.set_column(4, "order", pa.array(labels, pa.int8()))
    arms = {"a": (table, 3), "b": (table.sort_by("item_id"), 1), "c": (odd, 3)}
    paths = [write(tmp_path / name, rows, ranks) for name, (rows, ranks) in arms.items()]
    with sorting(tmp_path) as database, sorted_predictions(paths[0], TASKS, database) as reference:
        with sorted_predictions(paths[1], TASKS, database) as same:
            require_same_rows(same, reference)
        with sorted_predictions(paths[2], TASKS, database) as other:
            with pytest.raises(DataError, match=rf"c and .*a cannot be paired: row {row} has order 1 against null"):
                require_same_rows(other, reference)


def test_error_in_the_middle_of_a_stream_is_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="by hand"):
        with sorting(tmp_path) as database:
            with sorted_predictions(write(tmp_path / "a", drawn()), TASKS, database) as found:
                for _ in found.judged("view", "score"):
                    raise DataError("by hand")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_failed_sort_raises_an_error_that_names_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "a", drawn())
    with sorting(tmp_path) as database:
        database.execute("SET memory_limit = '1KiB'")
        with pytest.raises(DataError, match="a/predictions: cannot be sorted: .*emory"):
            with sorted_predictions(path, TASKS, database):
                pass


PEAK = """
import sys
from pathlib import Path
from sidestack.ranker.metrics import prediction_metrics
assert prediction_metrics(Path(sys.argv[1]), ("view",))["view"]["num"] == int(sys.argv[2])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
"""A program that prints its own peak memory in KiB; `ru_maxrss` would include the parent's, which held the rows."""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """`benchmarks.compare` measures the memory at 10^7 rows."""
    peaks = []
    for rows in (400_000, 3_200_000):
        columns = ["row", "user_id", "item_id", "view", "p_view"]
        path = write(tmp_path / str(rows), drawn(rows).select(columns), 1, group_rows=8192)
        done = subprocess.run([sys.executable, "-c", PEAK, str(path), str(rows)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 100, peaks  # MiB; eight times the rows would be 300 more
