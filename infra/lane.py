"""One lane of a `LaneReader`: the order of its rows in an epoch, and its part of each batch.

Example: a lane of 4 row groups of 3 rows, in buffers of 2 row groups, with 4 rows of the lane in each batch:

    row groups, permuted         2  0         |  1  3
    rows of a buffer, shuffled   2 0 8 1 7 6  |  11 5 10 9 4 3
    batches                      2 0 8 1  |  7 6 11 5  |  10 9 4 3

A buffer is read and shuffled as a whole; a batch may begin in one buffer and end in the next.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sidestack.infra.order import Buffer, Part, buffers
from sidestack.infra.pieces import piece_starts, pieces_in_batches
from sidestack.infra.rows import Rows, RowSource, concatenated
from sidestack.infra.shared_groups import SharedGroups

Integers = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """One rank's part of a global batch, or of several consecutive ones.

    Attributes:
        rows: the N rows, with the values that neighbours share.
        rows_N: their global row numbers.
        valid_N: False on padding (rows repeated to fill the last batch), which must be ignored.
    """

    rows: Rows
    rows_N: Integers
    valid_N: npt.NDArray[np.bool_]

    @property
    def table(self) -> pa.Table:
        """The columns that rows do not share."""
        return self.rows.own

    def split(self, rows: int) -> "Iterator[Batch]":
        """Yield consecutive parts of `rows` rows."""
        for at in range(0, len(self.rows_N), rows):
            part = slice(at, at + rows)
            yield Batch(self.rows.slice(at, rows), self.rows_N[part], self.valid_N[part])


class NumberedRows(NamedTuple):
    """Rows of a lane in their final order, and their global numbers."""

    rows: Rows
    rows_N: Integers


@dataclass(frozen=True)
class LaneOrder:
    """How a lane's rows are ordered and cut; see `LaneReader`.

    Attributes:
        batch_rows: rows of the lane in each batch. num_batches: batches of an epoch.
        seed: shuffles; None: rows stay in order. shuffle_groups: the most row groups of a buffer.
        keep_rows: the most rows of a piece. weigh: the weight of each row's piece; None: all pieces weigh the same.
    """

    batch_rows: int
    num_batches: int
    seed: int | None
    shuffle_groups: int
    keep_rows: int
    weigh: Callable[[Rows], Integers] | None


@dataclass(frozen=True)
class Lane:
    """A lane.

    Attributes:
        number: from 0. source: the rows of all lanes. order: how its rows are ordered.
        windows: for each window, the parts of row groups that the lane reads.
    """

    number: int
    source: RowSource
    order: LaneOrder
    windows: Sequence[Sequence[Part]]

    def read(self, epochs: range, start: int, groups: SharedGroups) -> Iterator[NumberedRows]:
        """Yield the lane's buffers, epoch after epoch, without the rows before batch `start` of the first epoch.

        With a seed, the last rows of an epoch that fill no batch are dropped.
        """
        end = self.order.num_batches * self.order.batch_rows
        for epoch in epochs:
            seed = self.order.seed
            rng = None if seed is None else np.random.default_rng([seed, epoch, self.number])
            skipped = start * self.order.batch_rows if epoch == epochs[0] else 0
            before = 0
            for buffer in buffers(self.windows, self.order.shuffle_groups, rng):
                kept = slice(max(skipped - before, 0), min(end - before, buffer.rows))
                if kept.start < kept.stop:
                    rows, rows_N = self._ordered(buffer, groups, before)
                    yield NumberedRows(rows.slice(kept.start, kept.stop - kept.start), rows_N[kept])
                before += buffer.rows

    def cut(self, ordered: Iterator[NumberedRows]) -> Iterator[Batch]:
        """Cut rows into the lane's part of each batch, followed by padding without end (without a seed)."""
        size = self.order.batch_rows
        rows: Rows | None = None
        rows_N = np.empty(0, np.int64)
        for more, more_N in ordered:
            rows = more if rows is None else concatenated([rows, more])
            rows_N = np.concatenate([rows_N, more_N])
            full = len(rows_N) // size * size
            for at in range(0, full, size):
                yield Batch(rows.slice(at, size), rows_N[at : at + size], np.ones(size, bool))
            rows, rows_N = rows.slice(full, len(rows_N) - full), rows_N[full:]
        left = len(rows_N)
        if rows is None or left == 0:
            rows, rows_N = self._last_row()
        fill_N = np.minimum(np.arange(size), len(rows_N) - 1)
        padding = Batch(rows.take(fill_N), rows_N[fill_N], np.zeros(size, bool))
        yield padding._replace(valid_N=np.arange(size) < left)
        while True:
            yield padding

    def _last_row(self) -> NumberedRows:
        """Read the lane's last row; for a lane without rows, row 0."""
        last = max((part.high - 1 for parts in self.windows for part in parts), default=0)
        (group,) = self.source.groups(last, last + 1)
        return NumberedRows(self.source.read(group).slice(last - group.start, 1), np.array([last]))

    def _ordered(self, buffer: Buffer, groups: SharedGroups, before: int) -> NumberedRows:
        """Read and order the rows of a buffer; the order depends on the number of rows of the lane `before` it."""
        parts = [groups.read(part.group).slice(part.low - part.group.start, part.rows) for part in buffer.parts]
        rows = concatenated(parts)
        rows_N = np.concatenate([np.arange(part.low, part.high) for part in buffer.parts])
        if buffer.mix_N is None:
            return NumberedRows(rows, rows_N)
        offsets = np.cumsum([0, *(part.rows for part in buffer.parts)])
        pieces = map(self._pieces, buffer.parts, parts)
        starts_P = np.concatenate([at + starts for at, starts in zip(offsets, pieces, strict=False)])
        room = self.order.batch_rows - before % self.order.batch_rows
        weights_P = None if self.order.weigh is None else self.order.weigh(rows)[starts_P]
        order_N = pieces_in_batches(starts_P, buffer.mix_N, self.order.batch_rows, room, weights_P)
        return NumberedRows(rows.take(order_N), rows_N[order_N])

    def _pieces(self, part: Part, rows: Rows) -> Integers:
        """Return the rows at which pieces of a part begin, counted from the part's first row."""
        keep_rows = self.order.keep_rows
        if keep_rows > 1 and rows.shared is not None:  # the runs stay together, and are in memory
            return piece_starts(rows.run_starts, rows.num_rows, keep_rows)
        starts = self.source.starts(part.group) if keep_rows > 1 else None
        starts_P = part.group.start + piece_starts(starts, part.group.rows, keep_rows)
        inside_P = starts_P[(starts_P > part.low) & (starts_P < part.high)]
        return np.concatenate([[part.low], inside_P]) - part.low
