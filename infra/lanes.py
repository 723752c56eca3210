"""The lane reader: every rank's part of the same global batches, whatever the number of ranks.

It is what makes a run with one rank comparable, step by step, with a run with eight.
"""

import collections
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.errors import ConfigError, DataError
from infra.gather import take_rows
from infra.parquet import RowGroup, read_row_group, row_groups

BLOCK_ROWS = 4096
"""Batches are put together, and converted, so many rows at a time: one call of Arrow takes as long for few rows."""

Check = Callable[[pa.Table, RowGroup], None]
Shared = dict[RowGroup, Future[pa.Table]]
"""Row groups that one lane has read, or is reading, and another one needs, too."""

T = TypeVar("T")


class Batch(NamedTuple):
    """One rank's part of a global batch, or of several in turn.

    Attributes:
        table: the rows, N of them.
        rows_N: their global row numbers.
        valid_N: False on padding (rows repeated to fill the last batch), which counts for nothing.
    """

    table: pa.Table
    rows_N: npt.NDArray[np.int64]
    valid_N: npt.NDArray[np.bool_]

    def split(self, rows: int) -> "Iterator[Batch]":
        """Give so many rows after another."""
        for at in range(0, len(self.rows_N), rows):
            part = slice(at, at + rows)
            yield Batch(self.table.slice(at, rows), self.rows_N[part], self.valid_N[part])


class _Chunk(NamedTuple):
    """Rows of a lane as they are read, their global numbers, and whether they are the epoch's last."""

    table: pa.Table
    rows_N: npt.NDArray[np.int64]
    is_last: bool


def require_lanes(batch_size: int, lanes: int, world_size: int) -> None:
    """Check that a `LaneReader` can share out batches.

    Raises:
        ConfigError: lanes, batch size and world size do not divide.
    """
    if lanes % world_size:
        raise ConfigError(f"lanes={lanes}: must be a multiple of the number of ranks, {world_size}")
    if batch_size % lanes:
        raise ConfigError(f"batch_size={batch_size}: must be a multiple of lanes, {lanes}")


class LaneReader:
    """Stream global batches that are the same for any number of ranks.

    The rows are cut into `lanes` equal contiguous ranges. Global batch g takes batch_size / lanes rows of every
    lane, and a rank owns a contiguous block of lanes. Hence every rank has the same number of batches, decodes
    (nearly) only its own row groups, and rank parts put side by side are the same global batch for any world size.

    With a seed, row groups are permuted within a lane and rows shuffled within a buffer of at most `shuffle_groups`
    row groups, all buffers as nearly equal as can be; what does not fill a last batch is dropped. Without, rows come
    in order and the last batches are padded. Every lane's next buffer is read by threads, one a core at most, while
    the present one is used.
    Memory: `lanes / world_size` times two buffers of `shuffle_groups + 1` row groups and one more, which the lane
    shares with the next; a block, and two batches ahead.

    Args:
        files: the Parquet files, in order. columns: what to read.
        batch_size: rows of a global batch, a multiple of lanes.
        lanes: how many ranges, a multiple of the world size.
        rank: this rank. world_size: how many there are.
        seed: shuffles when given.
        check: called with every table that was read and its row group; raises what is wrong with it.
        shuffle_groups: row groups a shuffling buffer holds at most.

    Raises:
        ConfigError: lanes, batch size and world size do not divide.
        DataError: the files hold no full batch (with a seed) or no row (without), or a column in several types.
    """

    def __init__(
        self,
        files: Sequence[Path],
        columns: Sequence[str],
        *,
        batch_size: int,
        lanes: int,
        rank: int,
        world_size: int,
        seed: int | None,
        check: Check | None = None,
        shuffle_groups: int = 4,
    ) -> None:
        require_lanes(batch_size, lanes, world_size)
        self.groups = row_groups(files, columns)
        self.columns = list(columns)
        self.num_rows = sum(group.rows for group in self.groups)
        self.seed = seed
        self.lane_batch = batch_size // lanes
        self.batch_rows = batch_size // world_size
        self._check = check
        self._shuffle_groups = shuffle_groups
        own = lanes // world_size
        self._lanes = range(rank * own, (rank + 1) * own)
        shares = [self.num_rows // lanes + (lane < self.num_rows % lanes) for lane in range(lanes)]
        starts = np.concatenate([[0], np.cumsum(shares)])
        self._bounds = [(int(starts[lane]), int(starts[lane + 1])) for lane in range(lanes)]
        self.num_batches = min(shares) // self.lane_batch if seed is not None else -(-max(shares) // self.lane_batch)
        if self.num_batches == 0:
            raise DataError(f"{len(files)} files hold {self.num_rows} rows: not one batch of {batch_size}")

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Give this rank's part of every global batch of an epoch, from batch number `start` on.

        Raises:
            DataError: a row group cannot be read, or the check refuses it.
        """
        return prefetched(self.batches(range(epoch, epoch + 1), start), depth=2)

    def batches(self, epochs: range, start: int = 0) -> Iterator[Batch]:
        """Give what `epoch` gives for one epoch after another, `start` being of the first.

        The batches are put together when they are asked for: the caller prefetches what it makes of them. Epochs in
        one stream need not wait for their first row groups, which are read while the epoch before ends.
        """
        return (batch for block in self.blocks(epochs, start) for batch in block.split(self.batch_rows))

    def blocks(self, epochs: range, start: int = 0) -> Iterator[Batch]:
        """Give what `batches` gives, about `BLOCK_ROWS` rows of them as one, so that converting takes few calls."""
        assert len(epochs) == 1 or self.seed is not None  # without a seed, a stream is padded without end
        together = max(BLOCK_ROWS // self.batch_rows, 1)
        # More threads than cores would wait for each other's turn in the interpreter.
        pool = ThreadPoolExecutor(min(len(self._lanes), os.cpu_count() or 1))
        try:
            shared: Shared = {}
            chunks = [_one_ahead(self._lane_chunks(lane, epochs, shared), pool) for lane in self._lanes]
            for epoch in epochs:
                streams = [self._lane_stream(lane, source) for lane, source in zip(self._lanes, chunks, strict=True)]
                first = start if epoch == epochs[0] else 0
                for _ in range(first):
                    collections.deque(map(next, streams), maxlen=0)
                for number in range(first, self.num_batches, together):
                    numbers = range(number, min(number + together, self.num_batches))
                    yield _joined([next(stream) for _ in numbers for stream in streams])
                if epoch < epochs[-1]:
                    for stream in streams:  # what does not fill a batch
                        collections.deque(stream, maxlen=0)
        finally:
            pool.shutdown(cancel_futures=True)

    def _lane_stream(self, lane: int, chunks: Iterator[_Chunk]) -> Iterator[Batch]:
        """Give an epoch of the lane, `lane_batch` rows at a time, padded without end once they run out (no seed)."""
        size = self.lane_batch
        table: pa.Table | None = None
        rows_N = np.empty(0, np.int64)
        for chunk, chunk_rows_N, is_last in chunks:
            table = chunk if table is None else pa.concat_tables([table, chunk])
            rows_N = np.concatenate([rows_N, chunk_rows_N])
            full = len(rows_N) // size * size
            for at in range(0, full, size):
                yield Batch(table.slice(at, size), rows_N[at : at + size], np.ones(size, bool))
            table, rows_N = table.slice(full), rows_N[full:]
            if is_last:
                break
        if self.seed is None:
            yield from self._padding(lane, table, rows_N)

    def _padding(self, lane: int, table: pa.Table | None, rows_N: npt.NDArray[np.int64]) -> Iterator[Batch]:
        size, left = self.lane_batch, len(rows_N)
        if table is None:  # a lane without rows borrows the schema and one row of the files' first group
            table, rows_N = read_row_group(self.groups[0], self.columns).slice(0, 1), np.zeros(1, np.int64)
        if left == 0 and table.num_rows == 0:
            last = self._bounds[lane][1] - 1
            group = next(group for group in self.groups if group.start <= last < group.start + group.rows)
            table = read_row_group(group, self.columns).slice(last - group.start, 1)
            rows_N = np.array([last])
        fill = np.minimum(np.arange(size), len(rows_N) - 1)
        valid_N = np.arange(size) < left
        yield Batch(table.take(pa.array(fill)), rows_N[fill], valid_N)
        while True:
            yield Batch(table.take(pa.array(fill)), rows_N[fill], np.zeros(size, bool))

    def _lane_chunks(self, lane: int, epochs: range, shared: Shared) -> Iterator[_Chunk]:
        """Give the lane's row groups, or with a seed shuffled buffers of them, epoch after epoch.

        Where a row group lies in two of this rank's lanes, the one that reads it leaves it in `shared` for the other.
        """
        low, high = self._bounds[lane]
        groups = [group for group in self.groups if group.start < high and group.start + group.rows > low]
        for epoch in epochs:
            if self.seed is None:
                for group in groups:
                    yield _Chunk(*self._clipped(group, low, high, shared), group is groups[-1])
                continue
            rng = np.random.default_rng([self.seed, epoch, lane])
            buffers = np.array_split(rng.permutation(len(groups)), -(-len(groups) // self._shuffle_groups))
            for number, buffer in enumerate(buffers):
                parts = [self._clipped(groups[i], low, high, shared) for i in buffer]
                rows_N = np.concatenate([rows for _, rows in parts])
                mix = rng.permutation(len(rows_N))
                table = take_rows(pa.concat_tables([table for table, _ in parts]), mix)
                yield _Chunk(table, rows_N[mix], number + 1 == len(buffers))

    def _clipped(self, group: RowGroup, low: int, high: int, shared: Shared) -> tuple[pa.Table, npt.NDArray[np.int64]]:
        """Give the rows of a row group from global number `low` to `high`, and their numbers."""
        own_low, own_high = self._bounds[self._lanes[0]][0], self._bounds[self._lanes[-1]][1]
        ends = group.start, group.start + group.rows
        first, last = max(low, ends[0]), min(high, ends[1])
        is_whole = (first, last) == (max(own_low, ends[0]), min(own_high, ends[1]))
        table = self._read(group) if is_whole else self._read_or_shared(group, shared)
        return table.slice(first - group.start, last - first), np.arange(first, last)

    def _read_or_shared(self, group: RowGroup, shared: Shared) -> pa.Table:
        own: Future[pa.Table] = Future()
        found = shared.setdefault(group, own)
        if found is own:
            try:
                own.set_result(self._read(group))
            except BaseException as error:  # raised here and in the other lane
                own.set_exception(error)
        else:
            shared.pop(group, None)
        return found.result()

    def _read(self, group: RowGroup) -> pa.Table:
        table = read_row_group(group, self.columns)
        if self._check is not None:
            self._check(table, group)
        return table


def _joined(parts: Sequence[Batch]) -> Batch:
    return Batch(
        pa.concat_tables([part.table for part in parts]).combine_chunks(),
        np.concatenate([part.rows_N for part in parts]),
        np.concatenate([part.valid_N for part in parts]),
    )


def _one_ahead(source: Iterator[T], pool: ThreadPoolExecutor) -> Iterator[T]:
    """Give the source's items, the next one being made by the pool meanwhile, from now on; no more than that one."""
    end = object()
    first: Future[T | object] = pool.submit(next, source, end)

    def items() -> Iterator[T]:
        upcoming = first
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, source, end)
            yield item  # type: ignore[misc]

    return items()


def prefetched(source: Iterator[T], depth: int) -> Iterator[T]:
    """Run the source in a thread, `depth` items ahead; its errors are raised here, in order."""
    ahead: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(item: T | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ahead.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not offer(item):
                    return
            offer(None)
        except BaseException as error:  # handed over, and raised by the consumer
            offer(error)

    thread = threading.Thread(target=work, name="lane-reader", daemon=True)
    thread.start()
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
