"""The examples of `infra.lane` and `infra.shared_groups`, and two threads that read a shared row group."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidestack.infra.errors import DataError
from sidestack.infra.lanes import LaneReader
from sidestack.infra.parquet import RowGroup
from sidestack.infra.rows import FileRows, Rows
from sidestack.infra.shared_groups import SharedGroups


class CountedRows(FileRows):
    """Rows 0 to 11 in row groups of equal size, with a record of the row groups that were read."""

    def __init__(self, folder: Path, row_group_size: int) -> None:
        pq.write_table(pa.table({"x": range(12)}), folder / "rows.parquet", row_group_size=row_group_size)
        super().__init__([folder / "rows.parquet"], ["x"])
        self.read_starts: list[int] = []

    def read(self, group: RowGroup) -> Rows:
        self.read_starts.append(group.start)
        return super().read(group)


def test_example_of_a_shuffled_lane(tmp_path: Path) -> None:
    source = CountedRows(tmp_path, row_group_size=3)
    reader = LaneReader(source, batch_size=4, lanes=1, rank=0, world_size=1, seed=0, shuffle_groups=2)
    assert [batch.rows_N.tolist() for batch in reader.epoch(0)] == [[2, 0, 8, 1], [7, 6, 11, 5], [10, 9, 4, 3]]
    assert [start // 3 for start in source.read_starts] == [2, 0, 1, 3]


def test_example_of_a_shared_row_group_is_read_once(tmp_path: Path) -> None:
    source = CountedRows(tmp_path, row_group_size=4)
    reader = LaneReader(source, batch_size=4, lanes=2, rank=0, world_size=1, seed=None)
    batches = [batch.rows_N.tolist() for batch in reader.epoch(0)]
    assert batches == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert sorted(source.read_starts) == [0, 4, 8]


def test_second_lane_waits_for_the_first_and_nothing_is_kept_after_it(tmp_path: Path) -> None:
    source = CountedRows(tmp_path, row_group_size=4)
    (shared,) = source.groups(4, 5)
    begun, may_end = threading.Event(), threading.Event()
    read = source.read

    def slow(group: RowGroup) -> Rows:
        begun.set()
        assert may_end.wait(10)
        return read(group)

    source.read = slow  # type: ignore[method-assign]
    groups = SharedGroups(source, {shared})
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(groups.read, shared)
        assert begun.wait(10)
        second = pool.submit(groups.read, shared)
        assert not second.done()
        may_end.set()
        assert first.result() is second.result()
    assert source.read_starts == [4]
    groups.read(shared)  # the next epoch
    assert source.read_starts == [4, 4]


def test_both_lanes_get_the_error_of_a_shared_row_group(tmp_path: Path) -> None:
    source = CountedRows(tmp_path, row_group_size=4)
    (shared,) = source.groups(4, 5)

    def fail(group: RowGroup) -> Rows:
        raise DataError(f"{group}: torn")

    source.read = fail  # type: ignore[method-assign]
    groups = SharedGroups(source, {shared})
    for _ in range(2):
        with pytest.raises(DataError, match="torn"):
            groups.read(shared)
