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

import numpy as np

from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.lane import Batch, Integers, Lane, LaneOrder
from sidestack.infra.order import lane_bounds, parts_between
from sidestack.infra.parquet import RowGroup
from sidestack.infra.prefetch import prefetched
from sidestack.infra.rows import Rows, RowSource, concatenated
from sidestack.infra.shared_groups import SharedGroups

BLOCK_ROWS = 16_384
"""Rows that are assembled and converted at a time: a call of Arrow takes as long for fewer rows."""


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
        keep_rows = keep_rows if seed is not None else 1
        bounds_WL = lane_bounds(source, lanes, windows, keep_rows)
        rows_L = np.diff(bounds_WL).sum(axis=0)
        num_batches = -(-rows_L.max() // self.lane_batch) if seed is None else rows_L.min() // self.lane_batch
        self.num_batches = int(num_batches)
        if self.num_batches == 0:
            raise DataError(f"{self.num_rows} rows in {lanes} lanes: not one batch of {batch_size}")
        order = LaneOrder(self.lane_batch, self.num_batches, seed, shuffle_groups, keep_rows, weigh)
        own = lanes // world_size
        self._own_lanes = [
            Lane(lane, source, order, [parts_between(source, *ends) for ends in bounds_WL[:, lane : lane + 2].tolist()])
            for lane in range(rank * own, (rank + 1) * own)
        ]
        uses = Counter(part.group for lane in self._own_lanes for parts in lane.windows for part in parts)
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
        pool = ThreadPoolExecutor(min(len(self._own_lanes), os.cpu_count() or 1))
        try:
            ahead_L = [prefetched(lane.read(epochs, start, groups), pool=pool) for lane in self._own_lanes]
            parts_L = [lane.cut(ahead) for lane, ahead in zip(self._own_lanes, ahead_L, strict=True)]
            for number in range(0, num_batches, of_block):
                numbers = range(number, min(number + of_block, num_batches))
                yield _joined([next(parts) for _ in numbers for parts in parts_L])
        finally:
            pool.shutdown(cancel_futures=True)


def _joined(parts: Sequence[Batch]) -> Batch:
    return Batch(
        concatenated([part.rows for part in parts]).in_one_chunk(),
        np.concatenate([part.rows_N for part in parts]),
        np.concatenate([part.valid_N for part in parts]),
    )
