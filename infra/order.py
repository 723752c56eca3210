"""The order in which lanes read rows: the range of each lane, and the shuffle of row groups and rows within it.

Nothing here reads rows, except the starts of requests in row groups that contain a lane's bound.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sidestack.infra.parquet import RowGroup
from sidestack.infra.pieces import piece_starts
from sidestack.infra.rows import RowSource

Integers = npt.NDArray[np.int64]


class Part(NamedTuple):
    """The rows `[low, high)` of a row group, in global row numbers."""

    group: RowGroup
    low: int
    high: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.high - self.low


class Buffer(NamedTuple):
    """Rows of a lane that are read, and with a seed shuffled, together.

    Attributes:
        parts: the row ranges. mix_N: a random permutation of the rows; None: they stay in order.
    """

    parts: Sequence[Part]
    mix_N: Integers | None

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(part.rows for part in self.parts)


def lane_bounds(source: RowSource, lanes: int, windows: Sequence[int], keep_rows: int) -> Integers:
    """Cut every window into one range per lane, of sizes as equal as pieces allow.

    Args:
        source: the rows. lanes: the number of lanes. windows: the rows at which windows begin, ascending from 0.
        keep_rows: the most rows of a piece. A bound within a piece is moved to the piece's first row; this reads the
            starts of the row group that contains the bound.

    Returns:
        int64 [W, lanes + 1]: in window w, lane l reads the rows from [w, l] to [w, l + 1].
    """
    edges = [*windows, source.num_rows]
    assert edges[0] == 0 and edges == sorted(edges)
    bounds_WL = np.empty((len(windows), lanes + 1), np.int64)
    for bounds_L, low, high in zip(bounds_WL, edges, edges[1:], strict=False):
        shares = [(high - low) // lanes + (lane < (high - low) % lanes) for lane in range(lanes)]
        bounds_L[:] = low + np.concatenate([[0], np.cumsum(shares)])
        if keep_rows > 1:
            bounds_L[1:-1] = [_piece_begin(source, bound, low, high, keep_rows) for bound in bounds_L[1:-1].tolist()]
    return bounds_WL


def _piece_begin(source: RowSource, row: int, low: int, high: int, keep_rows: int) -> int:
    """Return the first row of the piece that contains a row, or the window's first row if that is later."""
    if row in (low, high):
        return row
    (group,) = source.groups(row, row + 1)
    starts_P = group.start + piece_starts(source.starts(group), group.rows, keep_rows)
    return max(low, int(starts_P[np.searchsorted(starts_P, row, side="right") - 1]))


def parts_between(source: RowSource, low: int, high: int) -> list[Part]:
    """Return the parts of row groups that make up the rows `[low, high)`, in order."""
    if low == high:
        return []
    groups = source.groups(low, high)
    return [Part(group, max(low, group.start), min(high, group.start + group.rows)) for group in groups]


def buffers(
    windows: Sequence[Sequence[Part]], shuffle_groups: int, rng: np.random.Generator | None
) -> Iterator[Buffer]:
    """Yield the buffers of one epoch of a lane, window after window.

    With a generator, the row groups of a window are permuted and cut into buffers of at most `shuffle_groups` row
    groups, all buffers of a window as nearly equal as possible. Without, each row group is a buffer, in order.
    """
    for parts in windows:
        if rng is None:
            yield from (Buffer([part], None) for part in parts)
        elif parts:
            num_buffers = -(-len(parts) // shuffle_groups)
            for chosen in np.array_split(rng.permutation(len(parts)), num_buffers):
                taken = [parts[number] for number in chosen]
                yield Buffer(taken, rng.permutation(sum(part.rows for part in taken)))
