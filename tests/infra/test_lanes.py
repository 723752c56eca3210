import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infra.lanes
from infra.errors import ConfigError, DataError
from infra.lanes import Batch, LaneReader
from infra.parquet import RowGroup
from infra.rows import FileRows
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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.sampled_from([1, 2, 4]))
def test_in_order_every_row_comes_exactly_once(
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


def test_shuffled_epochs_differ_hold_no_row_twice_and_drop_less_than_a_batch_a_lane(tmp_path: Path) -> None:
    files = write(tmp_path, [100, 27])
    first, second = (np.concatenate(global_batches(files, 1, epoch, seed=1)) for epoch in (0, 1))
    assert len(set(first.tolist())) == len(first) > 127 - 4 * 2 - 3
    assert first.tolist() != second.tolist()
    assert first.tolist() == np.concatenate(global_batches(files, 1, 0, seed=1)).tolist()


def test_an_epoch_can_start_in_the_middle(tmp_path: Path) -> None:
    files = write(tmp_path, [100])
    whole = [batch.rows_N.tolist() for batch in reader(files, seed=5).epoch(2)]
    assert [batch.rows_N.tolist() for batch in reader(files, seed=5).epoch(2, start=7)] == whole[7:]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(8, 40), min_size=1, max_size=3), st.sampled_from([1, 2, 4]), st.integers(0, 2))
def test_epochs_in_one_stream_are_the_epochs_one_by_one(
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


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(8, 40), min_size=1, max_size=3), st.integers(1, 40), st.integers(0, 2))
def test_blocks_are_the_batches_one_after_another(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], block_rows: int, start: int
) -> None:
    source = reader(write(tmp_path_factory.mktemp("data"), sizes), seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infra.lanes, "BLOCK_ROWS", block_rows)
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
def test_a_row_group_in_two_lanes_is_read_once_an_epoch_where_one_rank_has_both(
    tmp_path: Path, seed: int | None
) -> None:
    files = write(tmp_path, [60], row_group_rows=8)  # lanes of 15 rows: every second row group is cut
    read: list[int] = []
    source = reader(files, seed=seed, check=lambda rows, group: read.append(group.index))
    found = [row for batch in source.batches(range(1)) for row in batch.rows_N[batch.valid_N].tolist()]
    assert len(set(found)) == len(found) > 48
    assert sorted(read) == list(range(8))


def test_the_next_buffer_is_read_while_the_last_one_is_used_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lane of three buffers: two are read with the first batch, and the next epoch's before this one ends."""
    monkeypatch.setattr(infra.lanes, "BLOCK_ROWS", 8)
    files = write(tmp_path, [48], row_group_rows=8)
    read: list[int] = []
    arrived = threading.Semaphore(0)

    def note(rows: pa.Table, group: RowGroup) -> None:
        read.append(group.index)
        arrived.release()

    source = reader(files, batch_size=8, lanes=1, seed=3, shuffle_groups=2, check=note)
    stream = source.batches(range(2))
    for batches, groups in [(1, 4), (2, 2), (2, 2)]:
        for _ in range(batches):
            next(stream)
        for _ in range(groups):
            assert arrived.acquire(timeout=10)
        assert not arrived.acquire(timeout=0.05)
    stream.close()
    assert sorted(read[:6]) == list(range(6))
    assert len(read) == 8


def test_the_check_sees_the_row_group_and_its_error_is_raised_here(tmp_path: Path) -> None:
    def check(rows: pa.Table, where: RowGroup) -> None:
        if where.start >= 14:
            raise DataError(f"{where}: refused")

    with pytest.raises(DataError, match=r"part-0\.parquet, row group [23]: refused"):
        list(reader(write(tmp_path, [28]), check=check).epoch(0))


def test_sizes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    files = write(tmp_path, [30])
    with pytest.raises(ConfigError, match="lanes=4: must be a multiple of the number of ranks, 3"):
        reader(files, world_size=3)
    with pytest.raises(ConfigError, match="batch_size=6: must be a multiple of lanes, 4"):
        reader(files, batch_size=6)
    with pytest.raises(DataError, match="not one batch of 64"):
        reader(files, batch_size=64, seed=0)
