"""Parquet files: row groups in global row coordinates, and a deterministic writer.

What is written here has checksums of pages and footer, and what is read here is held against those that a file has: a
bit that flips after a file was verified is an error, never another value (docs/integrity.md).
"""

import contextlib
import errno
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sidestack.infra.errors import DataError
from sidestack.infra.footer import read_footer, with_checksum
from sidestack.infra.row_bytes import row_bytes

ROW_GROUP_BYTES = 8 << 20
"""Bytes of a row group's rows in memory: what a reader decodes, checks and shuffles at a time."""
REPEATS = 4
"""How often the values of a column come on average where a dictionary of them saves bytes."""


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


def open_parquet(path: Path, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Open a Parquet file whose pages are held against their checksums; its footer is read unless it is given.

    Raises:
        DataError: the file is missing, truncated or not Parquet, or its footer was altered.
    """
    footer = footer or read_footer(path)
    try:
        file = pq.ParquetFile(path, metadata=footer, page_checksum_verification=True)
        _ = file.schema_arrow  # names that are no text are found here; a footer of another writer has no checksum
        return file
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def row_groups(files: Sequence[Path]) -> tuple[RowGroup, ...]:
    """List the row groups of the files of one table, in the order given, with global row numbers.

    Raises:
        DataError: see `read_footer`.
    """
    groups = []
    start = 0
    for path in files:
        footer = read_footer(path)
        for index in range(footer.num_row_groups):
            rows = footer.row_group(index).num_rows
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


def read_row_group(
    group: RowGroup, columns: Sequence[str] | None = None, footer: pq.FileMetaData | None = None
) -> pa.Table:
    """Read one row group, all columns or those named; its file's footer is read unless it is given.

    Raises:
        DataError: a column is missing, or the bytes were altered or cannot be decoded.
    """
    with open_parquet(group.path, footer) as file:
        require_columns(file.schema_arrow, columns or (), group)
        try:
            return _restored(file.read_row_group(group.index, columns=columns, use_threads=False))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{group}: cannot be decoded: {error}") from error


_OURS = b"sidestack."
"""What metadata keys of this project begin with."""
_LIST_SIZE = _OURS + b"list_size"
_PRECISION = _OURS + b"precision"


def _stored(schema: pa.Schema) -> pa.Schema:
    """Return the schema as it lies on disk, in types that other readers of Parquet know, so that `_restored` undoes it.

    Fixed-size lists become plain lists that remember their size: pyarrow up to 25 writes a null fixed-size list to
    Parquet but cannot read it again (apache/arrow#35692). Half precision becomes float32 that remembers it: Spark knows
    no FLOAT16. What this project notes of a column, its SID spec too, is repeated as a key-value of the file,
    `<key>.<column>`: only Arrow sees the metadata of a field.
    """
    fields, told = [], dict(schema.metadata or {})
    for field in schema:
        metadata, kind = dict(field.metadata or {}), field.type
        if pa.types.is_fixed_size_list(kind):
            metadata[_LIST_SIZE] = str(kind.list_size).encode()
            kind = pa.list_(kind.value_type)
        if pa.types.is_float16(_element(kind)):
            metadata[_PRECISION] = b"half"
            kind = _with_element(kind, pa.float32())
        fields.append(field.with_type(kind).with_metadata(metadata or None))
        name = field.name.encode()
        told |= {key + b"." + name: value for key, value in metadata.items() if key.startswith(_OURS)}
    return pa.schema(fields, told or None)


def _element(kind: pa.DataType) -> pa.DataType:
    """Return the type of a list's elements, or of a value that is no list."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind.value_type if any(test(kind) for test in lists) else kind


def _with_element(kind: pa.DataType, element: pa.DataType) -> pa.DataType:
    """Return the type of a list of other elements, or of a value of another type."""
    if pa.types.is_list(kind):
        return pa.list_(element)
    return pa.large_list(element) if pa.types.is_large_list(kind) else element


def _restored(table: pa.Table) -> pa.Table:
    """Undo `_stored` on a table that was read."""
    schema = restored_schema(table.schema)
    if schema == table.schema:  # a cast to the same takes time too
        return table.replace_schema_metadata(schema.metadata)
    return table.cast(schema)


def restored_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema that a file's rows have once they are read: the one its `TableWriter` was given."""
    fields = []
    for field in schema:
        metadata, kind = dict(field.metadata or {}), field.type
        if metadata.pop(_PRECISION, None):
            kind = _with_element(kind, pa.float16())
        if _LIST_SIZE in metadata:
            kind = pa.list_(kind.value_type, int(metadata.pop(_LIST_SIZE)))
        fields.append(field.with_type(kind).with_metadata(metadata or None))
    further = {key: value for key, value in (schema.metadata or {}).items() if not key.startswith(_OURS)}
    return pa.schema(fields, further or None)


def dictionary_columns(schema: pa.Schema) -> list[str]:
    """Return the Parquet paths of the columns that may be worth a dictionary: all but lists of float32 or float64.

    Their numbers hardly repeat. Of half precision there are 65,536 numbers at most: a dictionary and numbers of 16 bits
    or fewer take the bytes of halves, and every reader knows them; Spark 3.5 cannot read BYTE_STREAM_SPLIT.

    Args:
        schema: of the rows, as the `TableWriter` is given it.
    """
    paths = []
    for field in schema:
        element = _element(field.type)
        if element == field.type:
            paths.append(field.name)
        elif pa.types.is_float16(element) or not pa.types.is_floating(element):
            paths.append(f"{field.name}.list.element")
    return paths


def repeating_columns(table: pa.Table, candidates: Sequence[str]) -> list[str]:
    """Return the Parquet paths of the columns of which a dictionary saves bytes, judged by these rows.

    It does where values come `REPEATS` times on average, and for halves. Where most are different, it holds nearly all
    of them, and the numbers that point to them take as many bytes again.

    Args:
        table: the rows, as they lie on disk. candidates: paths of `dictionary_columns`.
    """
    found = []
    for path in candidates:
        name = path.removesuffix(".list.element")
        column = table[name] if name == path else pc.list_flatten(table[name])
        is_half = _PRECISION in (table.schema.field(name).metadata or {})
        is_plain = pa.types.is_primitive(column.type) or pa.types.is_string(column.type)
        if is_half or not is_plain or REPEATS * pc.count_distinct(column).as_py() <= len(column):
            found.append(path)
    return found


def integer_encodings(schema: pa.Schema, others: Sequence[str]) -> dict[str, str]:
    """Return the encoding of integers and times, by Parquet path: of each value its difference to the one before.

    Spark 3.5 reads it too, unlike BYTE_STREAM_SPLIT, which would take a tenth less.

    Args:
        schema: of the rows. others: paths that have another encoding, such as a dictionary.
    """
    paths = {f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name: field for field in schema}
    kinds = {path: _element(field.type) for path, field in paths.items() if path not in others}
    is_whole = (pa.types.is_integer, pa.types.is_timestamp)
    return {path: "DELTA_BINARY_PACKED" for path, kind in kinds.items() if any(test(kind) for test in is_whole)}


class _HashedFile:
    """A new file that is written once from the front, and hashed meanwhile.

    Attributes:
        sha256: of the bytes written so far. bytes: how many there are.
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
        """Keep what is appended from here on in memory."""
        self._held = bytearray()

    def release(self) -> bytes:
        """Return what was kept in memory, and append to the file again."""
        held, self._held = bytes(self._held or b""), None
        return held

    def tell(self) -> int:
        """Return where the next byte goes."""
        return self.bytes + len(self._held or b"")

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._file.closed


class TableWriter:
    """Write tables of one schema into a Parquet file whose bytes depend on the rows alone.

    A row group ends with the row that brings it to `row_group_bytes`, so how the caller cut the rows does not show in
    the file. Memory: one row group, and the table that is being written.

    Args:
        path: the file to write; its folder is made. schema: of the rows.
        row_group_bytes: bytes of a row group's rows as Arrow holds them (see `row_bytes`).
        row_group_rows: rows of a row group instead, whatever their bytes.

    Attributes:
        rows: how many were written. digest, bytes: SHA-256 (hexadecimal) and size of the file, once it is closed.
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
        self._pending_size = 0  # in what _bound is in
        with self._naming_disk_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file_schema = _stored(schema)
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
        """Append rows; the table must have the writer's schema (its metadata aside).

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
        """Append rows as a row group of their own, whatever its size; rows written before it end theirs.

        Raises:
            DataError: the disk is full or the file cannot be written.
        """
        if self._pending:
            self._flush()
        self._pending, self._pending_size = [table.cast(self.schema).cast(self._file_schema)], 0
        self._flush()

    def _group_ends(self, table: pa.Table) -> list[int]:
        """Return how many of the rows come before the end of each row group that they end."""
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
        # In one chunk: chunk boundaries would change the pages, hence the bytes.
        table = pa.concat_tables(self._pending).combine_chunks()
        with self._naming_disk_errors():
            self._writer = self._writer or self._opened(table)
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self.rows += table.num_rows
        self._pending = []

    def _opened(self, table: pa.Table) -> pq.ParquetWriter:
        """Begin the file, in encodings that suit its first row group, which depends on the rows alone."""
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
        """Write what is pending and close the file; after an error, only close it."""
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
            self._file.hold()  # what the writer writes when it closes is the footer
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
