import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import parquet
from infra.errors import ConfigError, DataError
from infra.parquet import Batch, LaneReader, RowGroup, TableWriter, read_row_group, row_groups

SCHEMA = pa.schema([("x", pa.int64()), ("list", pa.list_(pa.int64()))])


def table(low: int, high: int) -> pa.Table:
    values = range(low, high)
    return pa.table([list(values), [[v] * (v % 3) for v in values]], schema=SCHEMA)


def write(folder: Path, sizes: list[int], row_group_rows: int = 7) -> list[Path]:
    files, start = [], 0
    for number, size in enumerate(sizes):
        files.append(folder / f"part-{number}.parquet")
        with TableWriter(files[-1], SCHEMA, row_group_rows) as writer:
            writer.write(table(start, start + size))
        start += size
    return files


def reader(files: list[Path], world_size: int = 1, rank: int = 0, **changes: object) -> LaneReader:
    settings = {"batch_size": 8, "lanes": 4, "seed": None} | changes
    return LaneReader(files, ["x", "list"], rank=rank, world_size=world_size, **settings)  # type: ignore[arg-type]


def test_row_groups_are_numbered_over_all_files(tmp_path: Path) -> None:
    groups = row_groups(write(tmp_path, [10, 5]))
    assert [(group.index, group.start, group.rows) for group in groups] == [(0, 0, 7), (1, 7, 3), (0, 10, 5)]
    assert read_row_group(groups[1]).equals(table(7, 10))


def test_bytes_do_not_depend_on_how_the_rows_were_cut(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    with TableWriter(whole, SCHEMA, 7) as writer:
        writer.write(table(0, 40))
    with TableWriter(cut, SCHEMA, 7) as writer:
        for low, high in [(0, 1), (1, 20), (20, 39), (39, 40)]:
            writer.write(table(low, high))
    assert whole.read_bytes() == cut.read_bytes()


def test_files_that_store_a_column_in_two_types_are_refused_by_name(tmp_path: Path) -> None:
    files = []
    for number, element in enumerate((pa.float16(), pa.float32())):
        rows = pa.table(
            {"x": [1, 2], "v": pa.array([[0.5, 1.0]] * 2, pa.list_(element, 2)), "own": pa.nulls(2, element)}
        )
        files.append(tmp_path / f"part-{number}.parquet")
        with TableWriter(files[-1], rows.schema) as writer:
            writer.write(rows)
    with pytest.raises(DataError, match=r"part-1.*'v' is .*<.*float.*part-0.*halffloat.*one type"):
        LaneReader(files, ["x", "v"], batch_size=2, lanes=1, rank=0, world_size=1, seed=None)
    assert LaneReader(files, ["x"], batch_size=2, lanes=1, rank=0, world_size=1, seed=None).num_rows == 4


def test_null_vectors_and_field_metadata_survive(tmp_path: Path) -> None:
    field = pa.field("v", pa.list_(pa.float16(), 2), metadata={"who": "me"})
    rows = pa.table([pa.array([[0.5, 1.0], None, [2.0, 3.0]], field.type)], schema=pa.schema([field]))
    with TableWriter(tmp_path / "v.parquet", rows.schema) as writer:
        writer.write(rows)
    read = read_row_group(row_groups([tmp_path / "v.parquet"])[0])
    assert read.equals(rows)
    assert read.schema.field("v").metadata == {b"who": b"me"}


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    (file,) = write(tmp_path, [20])
    os.truncate(file, 100)
    with pytest.raises(DataError, match=r"part-0\.parquet: cannot be read as Parquet"):
        row_groups([file])


def test_a_missing_column_names_file_and_row_group(tmp_path: Path) -> None:
    (group,) = row_groups(write(tmp_path, [5]))
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 0: column 'y' is missing"):
        read_row_group(group, ["y"])


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = TableWriter(tmp_path / "a.parquet", SCHEMA)
    monkeypatch.setattr(parquet.pq.ParquetWriter, "write_table", full)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be written: no space left on the disk"), writer:
        writer.write(table(0, 3))


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
    found = [batch.rows_N.tolist() for batch in source.batches(range(1, 4), start)]
    assert found == [
        batch.rows_N.tolist()
        for epoch in (1, 2, 3)
        for batch in source.epoch(epoch, start if epoch == 1 else 0)
    ]  # fmt: skip


def test_the_next_buffer_is_read_while_the_last_one_is_used_and_no_more(tmp_path: Path) -> None:
    """One lane of three buffers: two are read with the first batch, and the next epoch's before this one ends."""
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
