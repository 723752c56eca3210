"""Lane readers: order and shuffling of rows, equal batches for any number of ranks, balance of weights, prefetch."""

import threading
from collections.abc import Generator, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sidestack.infra.lanes
from sidestack.infra.balance import SLACK
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.lane import Batch
from sidestack.infra.lanes import LaneReader
from sidestack.infra.order import buffers, parts_between
from sidestack.infra.parquet import RowGroup
from sidestack.infra.pieces import piece_starts
from sidestack.infra.rows import Check, CountedFile, FileRows, Rows, RowSource
from tests.infra.test_parquet import write


def reader(files: list[Path], world_size: int = 1, rank: int = 0, **changes: object) -> LaneReader:
    settings = {"batch_size": 8, "lanes": 4, "seed": None} | changes
    source = FileRows(files, ["x", "list"], settings.pop("check", None))  # type: ignore[arg-type]
    return LaneReader(source, rank=rank, world_size=world_size, **settings)  # type: ignore[arg-type]


def global_batches(files: list[Path], world_size: int, epoch: int, **changes: object) -> list[list[int]]:
    parts: list[Iterator[Batch]] = [
        reader(files, world_size, rank, **changes).epoch(epoch) for rank in range(world_size)
    ]
    return [[int(x) for batch in batches for x in batch.table["x"].to_numpy()] for batches in zip(*parts, strict=True)]


@pytest.mark.parametrize("seed", [None, 3])
def test_global_batches_are_the_same_for_any_number_of_ranks(tmp_path: Path, seed: int | None) -> None:
    files = write(tmp_path, [50, 33, 20])
    one = global_batches(files, 1, 0, seed=seed)
    assert one == global_batches(files, 2, 0, seed=seed) == global_batches(files, 4, 0, seed=seed)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.sampled_from([1, 2, 4]))
def test_every_row_is_read_exactly_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], lanes: int
) -> None:
    files = write(tmp_path_factory.mktemp("data"), sizes)
    seen = []
    for batch in reader(files, lanes=lanes).epoch(0):
        assert batch.table["x"].to_pylist() == batch.rows_N.tolist()
        assert batch.table.num_rows == 8
        assert batch.table["list"].to_pylist() == [[v] * (v % 3) for v in batch.rows_N.tolist()]
        seen += batch.rows_N[batch.valid_N].tolist()
    assert sorted(seen) == list(range(sum(sizes)))


def test_shuffled_epochs_differ_and_have_no_duplicates_and_drop_less_than_a_batch_per_lane(tmp_path: Path) -> None:
    files = write(tmp_path, [100, 27])
    first, second = (np.concatenate(global_batches(files, 1, epoch, seed=1)) for epoch in (0, 1))
    assert len(set(first.tolist())) == len(first) > 127 - 4 * 2 - 3
    assert first.tolist() != second.tolist()
    assert first.tolist() == np.concatenate(global_batches(files, 1, 0, seed=1)).tolist()


class Requests(FileRows):
    """Files whose rows belong to requests that begin at given rows."""

    def __init__(self, files: Sequence[Path], begins: Sequence[int], check: Check | None = None) -> None:
        super().__init__(files, ["x", "list"], check)
        self.files, self.begins = files, begins

    def starts(self, group: RowGroup) -> npt.NDArray[np.int64]:  # type: ignore[override]
        inside = [row - group.start for row in self.begins if 0 <= row - group.start < group.rows]
        return np.array(inside, np.int64)


def requests(folder: Path, rows: int, seed: int) -> Requests:
    """Write requests of 1 to 6 rows; some extend over two row groups (of 7 rows) or over both files."""
    sizes = np.random.default_rng(seed).integers(1, 7, rows)
    begins = np.cumsum(sizes) - sizes
    return Requests(write(folder, [rows // 3, rows - rows // 3]), begins[begins < rows].tolist())


def rows_of(source: RowSource, start: int = 0, **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"batch_size": 8, "lanes": 4, "rank": 0, "world_size": 1, "seed": 3} | changes
    batches = LaneReader(source, **settings).batches(range(1), start)
    return [batch.rows_N.tolist() for batch in batches]


ORDERS: dict[str, dict[str, Any]] = {
    "in order": {"seed": None},
    "in order, windows": {"seed": None, "windows": (0, 31, 90)},
    "shuffled": {"shuffle_groups": 1},
    "windows": {"windows": (0, 31, 90), "shuffle_groups": 2},
    "requests": {"keep_rows": 4, "shuffle_groups": 2},
    "requests, windows": {"keep_rows": 4, "windows": (0, 31, 90), "shuffle_groups": 1},
}


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_the_same_for_any_number_of_ranks(tmp_path: Path, order: str) -> None:
    source = requests(tmp_path, 150, seed=1)
    one = rows_of(source, **ORDERS[order])
    for ranks in (2, 4):
        parts = [rows_of(source, rank=rank, world_size=ranks, **ORDERS[order]) for rank in range(ranks)]
        assert [sum(batch, []) for batch in zip(*parts, strict=True)] == one


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("start", [0, 1, 7, 15])
@pytest.mark.parametrize("lanes", [1, 4])
def test_epoch_can_start_at_any_batch(tmp_path: Path, order: str, start: int, lanes: int) -> None:
    source = requests(tmp_path, 150, seed=2)
    whole = rows_of(source, lanes=lanes, **ORDERS[order])
    assert rows_of(source, start, lanes=lanes, **ORDERS[order]) == whole[start:]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("start", [0, 7, 15])
def test_start_in_the_middle_reads_no_earlier_buffer(tmp_path: Path, order: str, start: int) -> None:
    changes = {"shuffle_groups": 4, "windows": (0,), "seed": 3} | ORDERS[order]
    written, read = requests(tmp_path, 150, seed=2), []
    source = Requests(written.files, written.begins, check=lambda rows, group: read.append(group.start))
    rows_of(source, start, lanes=1, **changes)
    windows = [parts_between(source, *edges) for edges in pairwise([*changes["windows"], 150])]  # type: ignore[misc]
    rng = np.random.default_rng([3, 0, 0]) if changes["seed"] else None
    expected, end = [], 0
    for buffer in buffers(windows, changes["shuffle_groups"], rng):  # type: ignore[arg-type]
        end += buffer.rows
        expected += [part.group.start for part in buffer.parts if end > 8 * start]
    assert sorted(read) == sorted({*expected})
    assert (start == 0) == (len(read) >= 22)


def test_windows_are_in_order_in_every_lane(tmp_path: Path) -> None:
    source = requests(tmp_path, 150, seed=3)
    edges = (0, 32, 92)
    for seed in (None, 5):
        batches = rows_of(source, lanes=2, seed=seed, windows=edges)
        for lane in (0, 1):
            rows = [row for batch in batches for row in batch[4 * lane : 4 * lane + 4]]
            assert (np.diff(np.searchsorted(edges, rows, side="right")) >= 0).all()
            assert (rows[:16] == sorted(rows[:16])) == (seed is None)
        assert len({row for batch in batches for row in batch}) > 150 - 8


def test_requests_are_shuffled_row_by_row_unless_they_are_kept_together(tmp_path: Path) -> None:
    source = requests(tmp_path, 150, seed=4)
    assert rows_of(source) == rows_of(FileRows(source.files, ["x"]), keep_rows=9) != rows_of(source, keep_rows=9)


@settings(max_examples=60)
@given(st.integers(60, 150), st.integers(0, 99), st.integers(2, 6), st.sampled_from([(0,), (0, 21, 50)]))
def test_rows_of_a_piece_are_consecutive_in_a_lane(
    tmp_path_factory: pytest.TempPathFactory, rows: int, seed: int, keep_rows: int, windows: tuple[int, ...]
) -> None:
    source = requests(tmp_path_factory.mktemp("data"), rows, seed)
    pieces = [g.start + piece_starts(source.starts(g), g.rows, keep_rows) for g in source.groups(0, rows)]
    begins = {*np.concatenate(pieces).tolist(), *windows}
    batches = rows_of(source, lanes=2, seed=seed, keep_rows=keep_rows, windows=windows, shuffle_groups=2)
    for lane in (0, 1):
        stream = [row for batch in batches for row in batch[4 * lane : 4 * lane + 4]]
        assert len(set(stream)) == len(stream)
        assert stream[0] in begins
        assert all(row == before + 1 or row in begins for before, row in pairwise(stream))
        assert all(row == before + 1 or before + 1 in begins | {rows} for before, row in pairwise(stream))


WEIGHTS_N = np.append(np.random.default_rng(5).integers(0, 20, 5999), 1000)
"""The last row, in the last lane, weighs as much as a hundred others."""


def weights_by_rank(source: RowSource, ranks: int, weigh: bool) -> npt.NDArray[np.int64]:
    """Return the weight of each rank's part of each batch, [batches, ranks]; all parts have equally many rows."""

    def weighed(rows: Rows) -> npt.NDArray[np.int64]:
        return WEIGHTS_N[rows.own["x"].to_numpy()]

    changes: dict[str, Any] = {"batch_size": 512, "weigh": weighed if weigh else None, "shuffle_groups": 99}
    parts = [rows_of(source, rank=rank, world_size=ranks, **changes) for rank in range(ranks)]
    assert {len(rows) for batches in parts for rows in batches} == {512 // ranks}
    return np.array([[WEIGHTS_N[rows].sum() for rows in each] for each in zip(*parts, strict=True)])


def test_batch_with_a_very_heavy_row_is_balanced_over_ranks(tmp_path: Path) -> None:
    source = FileRows(write(tmp_path, [6000], row_group_rows=100), ["x"])
    for ranks in (2, 4):
        plain_GR, balanced_GR = (weights_by_rank(source, ranks, weigh) for weigh in (False, True))
        apart = [(each_GR.max(1) - each_GR.min(1)).max() for each_GR in (plain_GR, balanced_GR)]
        assert apart[0] > 750
        assert apart[1] < 2 * SLACK  # SLACK bounds the excess over the mean; below it is chance
    assert balanced_GR.sum(1).tolist() == weights_by_rank(source, 1, True)[:, 0].tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(60, 150), st.integers(0, 99), st.sampled_from([1, 4]), st.integers(0, 3000))
def test_weights_change_only_the_order_and_equally_for_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, rows: int, seed: int, keep_rows: int, heaviest: int
) -> None:
    source = requests(tmp_path_factory.mktemp("data"), rows, seed)
    weights_N = np.random.default_rng(seed).integers(0, heaviest + 1, rows)
    changes: dict[str, Any] = {"keep_rows": keep_rows, "seed": seed, "shuffle_groups": 3}
    changes["weigh"] = lambda found: weights_N[found.own["x"].to_numpy()]
    one = rows_of(source, **changes)
    parts = [rows_of(source, rank=rank, world_size=2, **changes) for rank in range(2)]
    assert [sum(batch, []) for batch in zip(*parts, strict=True)] == one
    assert rows_of(source, 2, **changes) == one[2:]
    assert len({row for batch in one for row in batch}) == 8 * len(one)


def test_rank_opens_the_files_of_its_lanes_and_of_lane_bounds(tmp_path: Path) -> None:
    sizes = [20] * 8
    files = [CountedFile(file, size) for file, size in zip(write(tmp_path, sizes), sizes, strict=True)]
    for keep_rows, opened in ((1, 2), (3, 4)):  # with pieces of 3 rows two further bounds must be looked up
        source = FileRows(files, ["x", "list"])
        rows_of(source, rank=1, world_size=4, keep_rows=keep_rows)
        assert source.num_opened == opened


def test_groups_of_returns_the_row_groups_of_rows(tmp_path: Path) -> None:
    files = write(tmp_path, [10, 20])
    found = reader(files).groups_of(np.array([29, 8, 3, 9, 28]))
    assert [(group.path, group.index) for group in found] == [(files[0], 0), (files[0], 1), (files[1], 2)]


@settings(max_examples=30)
@given(st.lists(st.integers(8, 40), min_size=1, max_size=3), st.sampled_from([1, 2, 4]), st.integers(0, 2))
def test_epochs_in_one_stream_equal_single_epochs(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], buffer: int, start: int
) -> None:
    files = write(tmp_path_factory.mktemp("data"), sizes)
    source = reader(files, seed=3, shuffle_groups=buffer)
    start = min(start, source.num_batches)
    found = [batch.rows_N.tolist() for batch in source.batches(range(1, 4), start)]
    assert found == [
        batch.rows_N.tolist()
        for epoch in (1, 2, 3)
        for batch in source.epoch(epoch, start if epoch == 1 else 0)
    ]  # fmt: skip


@settings(max_examples=30)
@given(st.lists(st.integers(8, 40), min_size=1, max_size=3), st.integers(1, 40), st.integers(0, 2))
def test_blocks_are_concatenated_batches(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], block_rows: int, start: int
) -> None:
    source = reader(write(tmp_path_factory.mktemp("data"), sizes), seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sidestack.infra.lanes, "BLOCK_ROWS", block_rows)
        start = min(start, source.num_batches)
        blocks = list(source.blocks(range(2), start))
        batches = list(source.batches(range(2), start))
    assert all(len(block.rows_N) <= max(block_rows, 8) for block in blocks)
    assert [rows for block in blocks for rows in block.rows_N.tolist()] == [
        row for batch in batches for row in batch.rows_N.tolist()
    ]
    for batch in batches:
        assert len(batch.rows_N) == len(batch.valid_N) == 8
        assert batch.table["x"].to_pylist() == batch.rows_N.tolist()


@pytest.mark.parametrize("seed", [None, 3])
def test_row_group_in_two_lanes_of_a_rank_is_read_once_per_epoch(tmp_path: Path, seed: int | None) -> None:
    files = write(tmp_path, [60], row_group_rows=8)  # lanes of 15 rows: every second row group is cut
    read: list[int] = []
    source = reader(files, seed=seed, check=lambda rows, group: read.append(group.index))
    found = [row for batch in source.batches(range(1)) for row in batch.rows_N[batch.valid_N].tolist()]
    assert len(set(found)) == len(found) > 48
    assert sorted(read) == list(range(8))


def test_exactly_one_buffer_is_prefetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane with three buffers per epoch: two are read for the first batch, and the next epoch's ahead of time."""
    monkeypatch.setattr(sidestack.infra.lanes, "BLOCK_ROWS", 8)
    files = write(tmp_path, [48], row_group_rows=8)
    read: list[int] = []
    arrived = threading.Semaphore(0)

    def record(rows: pa.Table, group: RowGroup) -> None:
        read.append(group.index)
        arrived.release()

    source = reader(files, batch_size=8, lanes=1, seed=3, shuffle_groups=2, check=record)
    stream = source.batches(range(2))
    for batches, groups in [(1, 4), (2, 2), (2, 2)]:
        for _ in range(batches):
            next(stream)
        for _ in range(groups):
            assert arrived.acquire(timeout=10)
        assert not arrived.acquire(timeout=0.05)
    assert isinstance(stream, Generator)
    stream.close()
    assert sorted(read[:6]) == list(range(6))
    assert len(read) == 8


def test_check_gets_the_row_group_and_its_error_is_raised(tmp_path: Path) -> None:
    def check(rows: pa.Table, where: RowGroup) -> None:
        if where.start >= 14:
            raise DataError(f"{where}: refused")

    with pytest.raises(DataError, match=r"part-0\.parquet, row group [23]: refused"):
        list(reader(write(tmp_path, [28]), check=check).epoch(0))


def test_indivisible_sizes_are_refused(tmp_path: Path) -> None:
    files = write(tmp_path, [30])
    with pytest.raises(ConfigError, match="lanes=4: must be a multiple of the number of ranks, 3"):
        reader(files, world_size=3)
    with pytest.raises(ConfigError, match="batch_size=6: must be a multiple of lanes, 4"):
        reader(files, batch_size=6)
    with pytest.raises(DataError, match="not one batch of 64"):
        reader(files, batch_size=64, seed=0)
