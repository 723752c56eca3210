"""Parquet files as we write them: encodings by column, row groups of one size, hashed while they are written."""

import contextlib
import errno
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sidestack.infra.errors import DataError
from sidestack.infra.footer import with_checksum
from sidestack.infra.parquet import PRECISION, element_of, stored_schema
from sidestack.infra.row_bytes import row_bytes

ROW_GROUP_BYTES = 8 << 20
"""Bytes of a row group's rows in memory: the unit that a reader decodes, checks and shuffles."""
REPEATS = 4
"""How often each value of a column must occur on average for a dictionary to save bytes."""


def dictionary_columns(schema: pa.Schema) -> list[str]:
    """Return the Parquet paths of columns where a dictionary may save bytes: all but lists of float32 or float64.

    The numbers of those lists hardly repeat. Half precision has at most 65,536 values: a dictionary and indices of at
    most 16 bits take as many bytes as the values, and every reader supports them. Spark 3.5 cannot read
    BYTE_STREAM_SPLIT.

    Args:
        schema: the schema of the rows, as passed to the `TableWriter`.
    """
    paths = []
    for field in schema:
        element = element_of(field.type)
        if element == field.type:
            paths.append(field.name)
        elif pa.types.is_float16(element) or not pa.types.is_floating(element):
            paths.append(f"{field.name}.list.element")
    return paths


def repeating_columns(table: pa.Table, candidates: Sequence[str]) -> list[str]:
    """Return the Parquet paths of columns where a dictionary saves bytes, judged by these rows.

    It does if values occur `REPEATS` times on average, and for float16. If most values differ, the dictionary holds
    nearly all of them, and the indices into it take as many bytes again.

    Args:
        table: the rows, as stored on disk. candidates: paths from `dictionary_columns`.
    """
    found = []
    for path in candidates:
        name = path.removesuffix(".list.element")
        column = table[name] if name == path else pc.list_flatten(table[name])
        is_half = PRECISION in (table.schema.field(name).metadata or {})
        is_plain = pa.types.is_primitive(column.type) or pa.types.is_string(column.type)
        if is_half or not is_plain or REPEATS * pc.count_distinct(column).as_py() <= len(column):
            found.append(path)
    return found


def integer_encodings(schema: pa.Schema, others: Sequence[str]) -> dict[str, str]:
    """Return the delta encoding for integers and times, by Parquet path.

    Spark 3.5 can read it, unlike BYTE_STREAM_SPLIT, which would take a tenth fewer bytes.

    Args:
        schema: the schema of the rows. others: paths that have another encoding, such as a dictionary.
    """
    paths = {f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name: field for field in schema}
    kinds = {path: element_of(field.type) for path, field in paths.items() if path not in others}
    is_whole = (pa.types.is_integer, pa.types.is_timestamp)
    return {path: "DELTA_BINARY_PACKED" for path, kind in kinds.items() if any(test(kind) for test in is_whole)}


class _HashedFile:
    """A new file that is written sequentially and hashed while it is written.

    Attributes:
        sha256: hash of the bytes written so far. bytes: their number.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self._held: bytearray | None = None

    def write(self, data: bytes) -> int:
        """Append bytes."""
        if self._held is not None:
            self._held += data
            return len(data)
        written = self._file.write(data)
        self.sha256.update(data)
        self.bytes += written
        return written

    def hold(self) -> None:
        """Keep further bytes in memory instead of appending them."""
        self._held = bytearray()

    def release(self) -> bytes:
        """Return the bytes kept in memory, and append further ones to the file again."""
        held, self._held = bytes(self._held or b""), None
        return held

    def tell(self) -> int:
        """Return the position of the next byte."""
        return self.bytes + len(self._held or b"")

    def flush(self) -> None:
        """Pass buffered bytes to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._file.closed


class TableWriter:
    """A writer of tables of one schema into a Parquet file whose bytes depend on the rows alone.

    A row group ends with the row that brings it to `row_group_bytes`, so the file does not depend on how the caller cut
    the rows into tables. Memory: one row group, and the table that is being written.

    Args:
        path: the file to write; its folder is created. schema: the schema of the rows.
        row_group_bytes: bytes of a row group's rows as Arrow holds them (see `row_bytes`).
        row_group_rows: limit row groups by this number of rows instead.

    Attributes:
        rows: the number of rows written. digest, bytes: SHA-256 (hexadecimal) and size of the file, once it is closed.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        *,
        row_group_bytes: int = ROW_GROUP_BYTES,
        row_group_rows: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.schema = schema
        self.rows = 0
        self._row_group_rows = row_group_rows
        self._bound = row_group_rows or row_group_bytes
        self._pending: list[pa.Table] = []
        self._pending_size = 0  # in the unit of _bound
        with self._naming_disk_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file_schema = stored_schema(schema)
            self._file = _HashedFile(self.path)
        self._writer: pq.ParquetWriter | None = None

    @property
    def digest(self) -> str:
        """The SHA-256 of the closed file, hexadecimal."""
        assert self._file.closed
        return self._file.sha256.hexdigest()

    @property
    def bytes(self) -> int:
        """The size of the closed file."""
        assert self._file.closed
        return self._file.bytes

    def write(self, table: pa.Table) -> None:
        """Append rows; the table must have the writer's schema (except for metadata).

        Raises:
            DataError: the disk is full or the file cannot be written.
        """
        table = table.cast(self.schema)
        stored, begin = table.cast(self._file_schema), 0
        for end in self._group_ends(table):
            self._pending.append(stored.slice(begin, end - begin))
            self._flush()
            begin = end
        if begin < stored.num_rows:
            self._pending.append(stored.slice(begin))

    def write_group(self, table: pa.Table) -> None:
        """Append rows as a row group of their own, whatever its size, after a row group of the pending rows.

        Raises:
            DataError: the disk is full or the file cannot be written.
        """
        if self._pending:
            self._flush()
        self._pending, self._pending_size = [table.cast(self.schema).cast(self._file_schema)], 0
        self._flush()

    def _group_ends(self, table: pa.Table) -> list[int]:
        """Return the end, in these rows, of each row group that they complete."""
        sizes_N = np.ones(table.num_rows, np.int64) if self._row_group_rows else row_bytes(table)
        total_N = self._pending_size + np.cumsum(sizes_N)
        ends, closed = [], 0  # size of the row groups that ended
        while (end := int(np.searchsorted(total_N, closed + self._bound)) + 1) <= table.num_rows:
            ends.append(end)
            closed = int(total_N[end - 1])
        self._pending_size = (int(total_N[-1]) if table.num_rows else self._pending_size) - closed
        return ends

    def _flush(self) -> None:
        """Write the pending rows as one row group."""
        # In one chunk: chunk boundaries would change the pages, and so the bytes.
        table = pa.concat_tables(self._pending).combine_chunks()
        with self._naming_disk_errors():
            self._writer = self._writer or self._opened(table)
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self.rows += table.num_rows
        self._pending = []

    def _opened(self, table: pa.Table) -> pq.ParquetWriter:
        """Open the file with encodings chosen by its first row group, which depends on the rows alone."""
        repeating = repeating_columns(table, dictionary_columns(self.schema))
        return pq.ParquetWriter(
            self._file,
            self._file_schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=repeating,
            column_encoding=integer_encodings(self._file_schema, repeating),
            write_page_checksum=True,
        )

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the pending rows and close the file; after an error, only close it."""
        if kind is not None:
            with contextlib.suppress(Exception):
                self._close()
            return
        if self._pending:
            self._flush()
        with self._naming_disk_errors():
            self._close()

    def _close(self) -> None:
        try:
            writer = self._writer or self._opened(self._file_schema.empty_table())
            self._file.hold()  # on close, the writer writes the footer
            writer.close()
            self._file.write(with_checksum(self._file.release()))
        finally:
            self._file.close()

    @contextlib.contextmanager
    def _naming_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = "no space left on the disk" if error.errno == errno.ENOSPC else str(error)
            raise DataError(f"{self.path}: cannot be written: {reason}") from error
