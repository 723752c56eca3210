"""The assignment of rows to lanes and buffers, which is decided before any row is read."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sidestack.infra.order import Part, buffers, lane_bounds, parts_between
from sidestack.infra.parquet import RowGroup


class NumberedRows:
    """A source of row groups of ten rows with runs that begin at given rows; records whose starts are read."""

    def __init__(self, num_rows: int, runs: tuple[int, ...] = ()) -> None:
        self.num_rows = num_rows
        self.runs = np.array(runs, np.int64)
        self.requested: list[int] = []

    def groups(self, low: int, high: int) -> list[RowGroup]:
        numbers = range(low // 10, -(-high // 10))
        return [
            RowGroup(Path("drawn"), number, 10 * number, min(10, self.num_rows - 10 * number)) for number in numbers
        ]

    def read(self, group: RowGroup) -> pa.Table:
        raise AssertionError("no row is read to decide their order")

    def starts(self, group: RowGroup) -> npt.NDArray[np.int64]:
        self.requested.append(group.index)
        return self.runs[(self.runs >= group.start) & (self.runs < group.start + group.rows)] - group.start


def test_windows_are_divided_into_equal_lanes() -> None:
    assert lane_bounds(NumberedRows(103), 4, [0], 1).tolist() == [[0, 26, 52, 78, 103]]
    assert lane_bounds(NumberedRows(103), 2, [0, 40, 41], 1).tolist() == [[0, 20, 40], [40, 41, 41], [41, 72, 103]]


def test_lane_bounds_move_to_the_begin_of_a_piece_by_reading_one_row_group_each() -> None:
    source = NumberedRows(100, runs=(0, 12, 23, 44, 45, 62, 81))
    assert lane_bounds(source, 4, [0], 100).tolist() == [[0, 23, 50, 70, 100]]  # a row group's first row begins a piece
    assert source.requested == [2, 5, 7]
    assert lane_bounds(source, 4, [0], 3).tolist() == [[0, 23, 50, 73, 100]]
    assert lane_bounds(source, 2, [0, 46], 100).tolist() == [[0, 23, 46], [46, 70, 100]]
    assert lane_bounds(source, 2, [0, 46, 50], 100).tolist()[1] == [46, 46, 50]  # the piece began before the window


def test_window_with_fewer_rows_than_lanes_leaves_lanes_empty() -> None:
    bounds = lane_bounds(NumberedRows(12, runs=(0, 11)), 4, [0, 10], 5)
    assert bounds.tolist() == [[0, 0, 5, 5, 10], [10, 11, 12, 12, 12]]


def test_parts_between_returns_the_rows_of_a_range() -> None:
    parts = parts_between(NumberedRows(35), 8, 33)
    assert [(part.group.index, part.low, part.high) for part in parts] == [
        (0, 8, 10),
        (1, 10, 20),
        (2, 20, 30),
        (3, 30, 33),
    ]
    assert parts_between(NumberedRows(35), 8, 8) == []


def windows() -> list[list[Part]]:
    return [parts_between(NumberedRows(100), low, high) for low, high in [(0, 45), (45, 45), (45, 100)]]


def test_buffers_follow_the_windows_and_are_nearly_equal() -> None:
    found = list(buffers(windows(), 2, np.random.default_rng(0)))
    assert [len(buffer.parts) for buffer in found] == [2, 2, 1, 2, 2, 2]
    for of_window, parts in zip((found[:3], found[3:]), (windows()[0], windows()[2]), strict=True):
        taken = [part for buffer in of_window for part in buffer.parts]
        assert taken != parts
        assert sorted(taken, key=lambda part: part.low) == parts
    for buffer in found:
        assert buffer.mix_N is not None
        assert sorted(buffer.mix_N.tolist()) == list(range(buffer.rows))


def test_each_row_group_is_a_buffer_without_shuffling() -> None:
    found = list(buffers(windows(), 2, None))
    assert [buffer.parts for buffer in found] == [[part] for parts in windows() for part in parts]
    assert all(buffer.mix_N is None for buffer in found)
