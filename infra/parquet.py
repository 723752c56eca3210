"""Parquet streaming: row groups in global row coordinates, a deterministic writer, and the lane reader.

The lane reader gives every rank its part of the same global batches, whatever the number of ranks. It is what
makes a run with one rank comparable, step by step, with a run with eight.
"""

import collections
import contextlib
import errno
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ConfigError, DataError

ROW_GROUP_ROWS = 8192


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file, and where its rows lie among all rows of the files it was listed with.

    Attributes:
        path: the file. index: the row group's number in it.
        start: the global number of its first row. rows: how many rows it has.
    """

    path: Path
    index: int
    start: int
    rows: int

    def __str__(self) -> str:
        """Name file and row group, as errors do."""
        return f"{self.path}, row group {self.index}"


Check = Callable[[pa.Table, RowGroup], None]
T = TypeVar("T")


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        DataError: the file is missing, truncated or not Parquet.
    """
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def row_groups(files: Sequence[Path], columns: Sequence[str] = ()) -> tuple[RowGroup, ...]:
    """List the row groups of the files, in the order given, with global row numbers.

    Args:
        files: the files of one table.
        columns: those that must have one type in all files; what a file lacks is told where it is read.

    Raises:
        DataError: see `open_parquet`; or a column's types differ: names it, both files and both types.
    """
    groups = []
    start = 0
    types: dict[str, tuple[Path, pa.DataType]] = {}
    for path in files:
        with open_parquet(path) as file:
            _require_types(file, path, columns, types)
            for index in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(index).num_rows
                groups.append(RowGroup(Path(path), index, start, rows))
                start += rows
    return tuple(groups)


def require_columns(schema: pa.Schema, columns: Sequence[str], where: RowGroup) -> None:
    """Check that columns are there.

    Raises:
        DataError: one is missing; names file, row group and column.
    """
    for column in columns:
        if column not in schema.names:
            raise DataError(f"{where}: column {column!r} is missing; the file has {schema.names}")


def _require_types(
    file: pq.ParquetFile, path: Path, columns: Sequence[str], types: dict[str, tuple[Path, pa.DataType]]
) -> None:
    """Hold a file's columns against the types that the files before it had, and note those that are new."""
    for field in _restored_schema(file.schema_arrow):
        if field.name not in columns:
            continue
        known_path, known = types.setdefault(field.name, (path, field.type))
        if field.type != known:
            raise DataError(
                f"{path}: column {field.name!r} is {field.type}, in {known_path} it is {known}:"
                " all files of a table must store a column in one type"
            )


def read_row_group(group: RowGroup, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one row group, all columns or those named.

    Raises:
        DataError: a column is missing, or the bytes cannot be decoded.
    """
    with open_parquet(group.path) as file:
        require_columns(file.schema_arrow, columns or (), group)
        try:
            return _restored(file.read_row_group(group.index, columns=columns, use_threads=False))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{group}: cannot be decoded: {error}") from error


_LIST_SIZE = b"sidestack.list_size"


def _stored(schema: pa.Schema) -> pa.Schema:
    """Give the schema as it lies on disk: fixed-size lists as plain lists that remember their size.

    pyarrow up to 25 writes a null fixed-size list to Parquet but cannot read it again (apache/arrow#35692).
    """
    fields = []
    for field in schema:
        if pa.types.is_fixed_size_list(field.type):
            size = {_LIST_SIZE: str(field.type.list_size).encode()}
            field = field.with_type(pa.list_(field.type.value_type)).with_metadata({**(field.metadata or {}), **size})
        fields.append(field)
    return pa.schema(fields, schema.metadata)


def _restored(table: pa.Table) -> pa.Table:
    """Undo `_stored` on a table that was read."""
    schema = _restored_schema(table.schema)
    return table if schema == table.schema else table.cast(schema)  # a cast to the same takes time too


def _restored_schema(schema: pa.Schema) -> pa.Schema:
    fields = []
    for field in schema:
        metadata = dict(field.metadata or {})
        if _LIST_SIZE in metadata:
            size = int(metadata.pop(_LIST_SIZE))
            field = field.with_type(pa.list_(field.type.value_type, size)).with_metadata(metadata or None)
        fields.append(field)
    return pa.schema(fields, schema.metadata)


def dictionary_columns(schema: pa.Schema) -> list[str]:
    """Give the Parquet paths of the columns whose values are worth a dictionary: all but embeddings.

    The numbers of an embedding hardly repeat; a dictionary of them took half of all the time of writing, and made
    the file larger.
    """
    elements = {field.name: getattr(field.type, "value_type", None) for field in schema}
    return [
        name if element is None else f"{name}.list.element"
        for name, element in elements.items()
        if element is None or not pa.types.is_floating(element)
    ]


class TableWriter:
    """Write tables of one schema into a Parquet file whose bytes depend on the rows alone.

    Rows are regrouped into row groups of a fixed size, so how the caller cut them does not show in the file.
    Memory: one row group.
    """

    def __init__(self, path: Path, schema: pa.Schema, row_group_rows: int = ROW_GROUP_ROWS) -> None:
        self.path = Path(path)
        self.schema = schema
        self.row_group_rows = row_group_rows
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        with self._naming_disk_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file_schema = _stored(schema)
            self._writer = pq.ParquetWriter(
                self.path,
                self._file_schema,
                compression="zstd",
                compression_level=3,
                use_dictionary=dictionary_columns(schema),
            )

    def write(self, table: pa.Table) -> None:
        """Append rows; the table must have the writer's schema (its metadata aside).

        Raises:
            DataError: the disk is full or the file cannot be written.
        """
        self._pending.append(table.cast(self.schema).cast(self._file_schema))
        self._pending_rows += table.num_rows
        while self._pending_rows >= self.row_group_rows:
            self._flush(self.row_group_rows)

    def _flush(self, rows: int) -> None:
        table = pa.concat_tables(self._pending)
        with self._naming_disk_errors():
            # One row group exactly, in one chunk: chunk boundaries would change the pages, hence the bytes.
            self._writer.write_table(table.slice(0, rows).combine_chunks(), row_group_size=max(rows, 1))
        rest = table.slice(rows)
        self._pending, self._pending_rows = ([rest], rest.num_rows) if rest.num_rows else ([], 0)

    def __enter__(self) -> Self:
        """Give the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is pending and close the file; after an error, only close it."""
        if kind is not None:
            with contextlib.suppress(Exception):
                self._writer.close()
            return
        if self._pending_rows:
            self._flush(self._pending_rows)
        with self._naming_disk_errors():
            self._writer.close()

    @contextlib.contextmanager
    def _naming_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = "no space left on the disk" if error.errno == errno.ENOSPC else str(error)
            raise DataError(f"{self.path}: cannot be written: {reason}") from error


class Batch(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
        table: the rows, N of them.
        rows_N: their global row numbers.
        valid_N: False on padding (rows repeated to fill the last batch), which counts for nothing.
    """

    table: pa.Table
    rows_N: npt.NDArray[np.int64]
    valid_N: npt.NDArray[np.bool_]


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

    With a seed, row groups are permuted within a lane and rows shuffled within a buffer of `shuffle_groups` row
    groups; what does not fill a last batch is dropped. Without, rows come in order and the last batches are padded.
    Every lane reads its next buffer in a thread while the present one is used.
    Memory: `lanes / world_size` times two buffers of `shuffle_groups + 1` row groups, and two batches ahead.

    Args:
        files: the Parquet files, in order. columns: what to read.
        batch_size: rows of a global batch, a multiple of lanes.
        lanes: how many ranges, a multiple of the world size.
        rank: this rank. world_size: how many there are.
        seed: shuffles when given.
        check: called with every table that was read and its row group; raises what is wrong with it.
        shuffle_groups: row groups a shuffling buffer holds.

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
        assert len(epochs) == 1 or self.seed is not None  # without a seed, a stream is padded without end
        chunks = [_one_ahead(self._lane_chunks(lane, epochs)) for lane in self._lanes]
        for epoch in epochs:
            streams = [self._lane_stream(lane, source) for lane, source in zip(self._lanes, chunks, strict=True)]
            for number in range(self.num_batches):
                parts = [next(stream) for stream in streams]
                if epoch > epochs[0] or number >= start:
                    yield _joined(parts)
            if epoch < epochs[-1]:
                for stream in streams:  # what does not fill a batch
                    collections.deque(stream, maxlen=0)

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

    def _lane_chunks(self, lane: int, epochs: range) -> Iterator[_Chunk]:
        """Give the lane's row groups, or with a seed shuffled buffers of them, epoch after epoch."""
        low, high = self._bounds[lane]
        groups = [group for group in self.groups if group.start < high and group.start + group.rows > low]
        for epoch in epochs:
            if self.seed is None:
                for group in groups:
                    yield _Chunk(*self._clipped(group, low, high), group is groups[-1])
                continue
            rng = np.random.default_rng([self.seed, epoch, lane])
            order = rng.permutation(len(groups))
            for at in range(0, len(order), self._shuffle_groups):
                parts = [self._clipped(groups[i], low, high) for i in order[at : at + self._shuffle_groups]]
                rows_N = np.concatenate([rows for _, rows in parts])
                mix = rng.permutation(len(rows_N))
                table = pa.concat_tables([table for table, _ in parts]).take(pa.array(mix))
                yield _Chunk(table, rows_N[mix], at + self._shuffle_groups >= len(order))

    def _clipped(self, group: RowGroup, low: int, high: int) -> tuple[pa.Table, npt.NDArray[np.int64]]:
        table = read_row_group(group, self.columns)
        if self._check is not None:
            self._check(table, group)
        first, last = max(low, group.start), min(high, group.start + group.rows)
        return table.slice(first - group.start, last - first), np.arange(first, last)


def _joined(parts: list[Batch]) -> Batch:
    return Batch(
        pa.concat_tables([part.table for part in parts]).combine_chunks(),
        np.concatenate([part.rows_N for part in parts]),
        np.concatenate([part.valid_N for part in parts]),
    )


def _one_ahead(source: Iterator[T]) -> Iterator[T]:
    """Give the source's items, the next one being made in a thread meanwhile; no more than that one."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming: Future[T | object] = pool.submit(next, source, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, source, end)
            yield item  # type: ignore[misc]


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
