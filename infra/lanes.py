"""The lane reader: every rank's part of the same global batches, whatever the number of ranks.

It makes a run with one rank comparable, step by step, with a run with eight. An example of four lanes and two ranks:

    rows         0 ------------------------------------------------------> num_rows
    lanes       |      0       |       1      |       2      |       3      |
    batches     |0|1|2|3|4|5|6||0|1|2|3|4|5|6||0|1|2|3|4|5|6||0|1|2|3|4|5|6|
    row groups  |    0    |    1    |    2    |    3    |    4    |    5    |
    ranks       |             0               |              1              |

Batch 3 is the four parts numbered 3. A row group that a lane's bound cuts in two, such as 1, is read once by its rank.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.order import Buffer, Part, buffers, lane_bounds, parts_between
from sidestack.infra.parquet import RowGroup
from sidestack.infra.pieces import piece_starts, pieces_in_batches
from sidestack.infra.prefetch import prefetched
from sidestack.infra.rows import Rows, RowSource, concatenated
from sidestack.infra.shared_groups import SharedGroups

BLOCK_ROWS = 16_384
"""Rows that are assembled and converted at a time: a call of Arrow takes as long for fewer rows."""

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


class _LaneRows(NamedTuple):
    """Rows of a lane in their final order, and their global numbers."""

    rows: Rows
    rows_N: Integers


def require_lanes(batch_size: int, lanes: int, world_size: int) -> None:
    """Check that a `LaneReader` can divide batches among lanes and ranks.

    Raises:
        ConfigError: lanes, batch size and world size do not divide.
    """
    if lanes % world_size:
        raise ConfigError(f"lanes={lanes}: must be a multiple of the number of ranks, {world_size}")
    if batch_size % lanes:
        raise ConfigError(f"batch_size={batch_size}: must be a multiple of lanes, {lanes}")


class LaneReader:
    """A reader of global batches that are the same for any number of ranks.

    The rows are cut into `lanes` equal contiguous ranges. Global batch g takes batch_size / lanes rows of every
    lane, and a rank owns a contiguous block of lanes. Hence every rank has the same number of batches, opens and
    decodes (nearly) only its own row groups, and rank parts put side by side are the same global batch for any world
    size. If there are several windows, each is cut this way, and a lane reads its range of one window after another.

    With a seed, row groups are permuted within a lane's range of a window, and rows are shuffled within buffers of at
    most `shuffle_groups` row groups, all as nearly equal as possible; rows that do not fill a last batch are dropped.
    Runs of rows that belong together (`RowSource.starts`) are shuffled whole, in pieces of at most `keep_rows` rows,
    and a lane's share of a batch holds whole pieces where some piece of the buffer fits. With `weigh`, pieces of equal
    rows are exchanged within a buffer until no share weighs much more than the others, where possible. Then no rank's
    part of a batch weighs much more than the average over its lanes. Without a seed, rows come in order and the last
    batches are padded.

    Threads, at most one per core, prefetch every lane's next buffer while the current one is used. A start in the
    middle of an epoch reads no row group before the buffer that holds the start.
    Memory: `lanes / world_size` times two buffers of `shuffle_groups + 1` row groups and one more, which the lane
    shares with the next; a block, and three prefetched batches.

    Args:
        source: the rows.
        batch_size: rows of a global batch, a multiple of lanes.
        lanes: the number of ranges, a multiple of the world size.
        rank: this rank. world_size: the number of ranks.
        seed: shuffles if set.
        shuffle_groups: the most row groups of a shuffle buffer.
        windows: the rows at which windows begin, ascending from 0.
        keep_rows: the most rows of a piece; 1: every row is shuffled by itself.
        weigh: returns, for each row, the cost of its piece beyond the number of rows, at least 0, int64 [N].

    Raises:
        ConfigError: lanes, batch size and world size do not divide.
        DataError: there is no full batch (with a seed) or no row (without), or a file cannot be opened.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        batch_size: int,
        lanes: int,
        rank: int,
        world_size: int,
        seed: int | None,
        shuffle_groups: int = 4,
        windows: Sequence[int] = (0,),
        keep_rows: int = 1,
        weigh: Callable[[Rows], Integers] | None = None,
    ) -> None:
        require_lanes(batch_size, lanes, world_size)
        self.source = source
        self.num_rows = source.num_rows
        self.seed = seed
        self.lanes = lanes
        self.lane_batch = batch_size // lanes
        self.batch_rows = batch_size // world_size
        self._shuffle_groups = shuffle_groups
        self._keep_rows = keep_rows if seed is not None else 1
        self._weigh = weigh
        own = lanes // world_size
        self._lanes = range(rank * own, (rank + 1) * own)
        bounds_WL = lane_bounds(source, lanes, windows, self._keep_rows)
        rows_L = np.diff(bounds_WL).sum(axis=0)
        num_batches = -(-rows_L.max() // self.lane_batch) if seed is None else rows_L.min() // self.lane_batch
        self.num_batches = int(num_batches)
        if self.num_batches == 0:
            raise DataError(f"{self.num_rows} rows in {lanes} lanes: not one batch of {batch_size}")
        self._parts = {
            lane: [parts_between(source, *bounds_L[lane : lane + 2].tolist()) for bounds_L in bounds_WL]
            for lane in self._lanes
        }
        uses = Counter(part.group for windows in self._parts.values() for parts in windows for part in parts)
        self._cut_groups = {group for group, number in uses.items() if number > 1}

    def groups_of(self, rows_N: Integers) -> list[RowGroup]:
        """Return the row groups that hold the given global rows, in order, for use in an error message."""
        left_N = np.unique(rows_N)
        found = []
        while len(left_N):
            (group,) = self.source.groups(int(left_N[0]), int(left_N[0]) + 1)
            found.append(group)
            left_N = left_N[left_N >= group.start + group.rows]
        return found

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this rank's part of every global batch of an epoch, from batch number `start` on.

        Raises:
            DataError: a row group cannot be read, or the source's check refuses it.
        """
        return prefetched(self.batches(range(epoch, epoch + 1), start), depth=3)

    def batches(self, epochs: range, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` for several epochs in turn; `start` applies to the first.

        Batches are assembled on demand: the caller prefetches what it computes from them. Within one stream, an epoch's
        first row groups are read while the epoch before ends.
        """
        return (batch for block in self.blocks(epochs, start) for batch in block.split(self.batch_rows))

    def blocks(self, epochs: range, start: int = 0) -> Iterator[Batch]:
        """Yield the rows of `batches` in blocks of about `BLOCK_ROWS` rows, so that conversion takes few calls."""
        assert 0 <= start <= self.num_batches
        assert len(epochs) == 1 or self.seed is not None  # without a seed, a stream is padded without end
        num_batches = len(epochs) * self.num_batches - start
        of_block = max(BLOCK_ROWS // self.batch_rows, 1)
        groups = SharedGroups(self.source, self._cut_groups)
        # More threads than cores would contend for the interpreter lock.
        pool = ThreadPoolExecutor(min(len(self._lanes), os.cpu_count() or 1))
        try:
            ahead_L = [prefetched(self._lane_buffers(lane, epochs, start, groups), pool=pool) for lane in self._lanes]
            parts_L = [self._lane_parts(lane, ahead) for lane, ahead in zip(self._lanes, ahead_L, strict=True)]
            for number in range(0, num_batches, of_block):
                numbers = range(number, min(number + of_block, num_batches))
                yield _joined([next(parts) for _ in numbers for parts in parts_L])
        finally:
            pool.shutdown(cancel_futures=True)

    def _lane_parts(self, lane: int, ordered: Iterator[_LaneRows]) -> Iterator[Batch]:
        """Yield the lane's part of each batch, then padding without end (only reached without a seed)."""
        size = self.lane_batch
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
            rows, rows_N = self._last_row(lane)
        fill_N = np.minimum(np.arange(size), len(rows_N) - 1)
        padding = Batch(rows.take(fill_N), rows_N[fill_N], np.zeros(size, bool))
        yield padding._replace(valid_N=np.arange(size) < left)
        while True:
            yield padding

    def _last_row(self, lane: int) -> _LaneRows:
        """Read the lane's last row; for a lane without rows, row 0."""
        last = max((part.high - 1 for parts in self._parts[lane] for part in parts), default=0)
        (group,) = self.source.groups(last, last + 1)
        return _LaneRows(self.source.read(group).slice(last - group.start, 1), np.array([last]))

    def _lane_buffers(self, lane: int, epochs: range, start: int, groups: SharedGroups) -> Iterator[_LaneRows]:
        """Read the lane's buffers, epoch after epoch, without the rows before batch `start` of the first epoch.

        With a seed, the last rows of an epoch that fill no batch are dropped.
        """
        end = self.num_batches * self.lane_batch
        for epoch in epochs:
            rng = np.random.default_rng([self.seed, epoch, lane]) if self.seed is not None else None
            skipped = start * self.lane_batch if epoch == epochs[0] else 0
            before = 0
            for buffer in buffers(self._parts[lane], self._shuffle_groups, rng):
                kept = slice(max(skipped - before, 0), min(end - before, buffer.rows))
                if kept.start < kept.stop:
                    parts = [
                        groups.read(part.group).slice(part.low - part.group.start, part.rows) for part in buffer.parts
                    ]
                    rows, rows_N = self._ordered(buffer, parts, before)
                    yield _LaneRows(rows.slice(kept.start, kept.stop - kept.start), rows_N[kept])
                before += buffer.rows

    def _ordered(self, buffer: Buffer, parts: Sequence[Rows], before: int) -> _LaneRows:
        """Order the rows of a buffer; the order depends on the number of rows of the lane `before` it."""
        rows = concatenated(parts)
        rows_N = np.concatenate([np.arange(part.low, part.high) for part in buffer.parts])
        if buffer.mix_N is None:
            return _LaneRows(rows, rows_N)
        offsets = np.cumsum([0, *(part.rows for part in buffer.parts)])
        pieces = map(self._pieces, buffer.parts, parts)
        starts_P = np.concatenate([at + starts for at, starts in zip(offsets, pieces, strict=False)])
        room = self.lane_batch - before % self.lane_batch
        weights_P = None if self._weigh is None else self._weigh(rows)[starts_P]
        order_N = pieces_in_batches(starts_P, buffer.mix_N, self.lane_batch, room, weights_P)
        return _LaneRows(rows.take(order_N), rows_N[order_N])

    def _pieces(self, part: Part, rows: Rows) -> Integers:
        """Return the rows at which pieces of a part begin, counted from the part's first row."""
        if self._keep_rows > 1 and rows.shared is not None:  # the runs stay together, and are in memory
            return piece_starts(rows.run_starts, rows.num_rows, self._keep_rows)
        starts = self.source.starts(part.group) if self._keep_rows > 1 else None
        starts_P = part.group.start + piece_starts(starts, part.group.rows, self._keep_rows)
        inside_P = starts_P[(starts_P > part.low) & (starts_P < part.high)]
        return np.concatenate([[part.low], inside_P]) - part.low


def _joined(parts: Sequence[Batch]) -> Batch:
    return Batch(
        concatenated([part.rows for part in parts]).in_one_chunk(),
        np.concatenate([part.rows_N for part in parts]),
        np.concatenate([part.valid_N for part in parts]),
    )
