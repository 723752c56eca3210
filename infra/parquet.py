"""Parquet files: row groups in global row coordinates, and a deterministic writer."""

import contextlib
import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import DataError

ROW_GROUP_ROWS = 8192
ROW_GROUP_BYTES = 8 << 20


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
    """Open a Parquet file; its footer is read unless it is given.

    Raises:
        DataError: the file is missing, truncated or not Parquet.
    """
    try:
        return pq.ParquetFile(path, metadata=footer)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def row_groups(files: Sequence[Path]) -> tuple[RowGroup, ...]:
    """List the row groups of the files of one table, in the order given, with global row numbers.

    Raises:
        DataError: see `open_parquet`.
    """
    groups = []
    start = 0
    for path in files:
        with open_parquet(path) as file:
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


def read_row_group(
    group: RowGroup, columns: Sequence[str] | None = None, footer: pq.FileMetaData | None = None
) -> pa.Table:
    """Read one row group, all columns or those named; its file's footer is read unless it is given.

    Raises:
        DataError: a column is missing, or the bytes cannot be decoded.
    """
    with open_parquet(group.path, footer) as file:
        require_columns(file.schema_arrow, columns or (), group)
        try:
            return _restored(file.read_row_group(group.index, columns=columns, use_threads=False))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{group}: cannot be decoded: {error}") from error


_LIST_SIZE = b"sidestack.list_size"


def _stored(schema: pa.Schema) -> pa.Schema:
    """Return the schema as it lies on disk: fixed-size lists as plain lists that remember their size.

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
    schema = restored_schema(table.schema)
    return table if schema == table.schema else table.cast(schema)  # a cast to the same takes time too


def restored_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema that a file's rows have once they are read: the one its `TableWriter` was given."""
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


def row_bytes(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return the bytes that each row takes as Arrow holds it: int64 [N]."""
    total_N = np.zeros(table.num_rows, np.int64)
    for column in table.combine_chunks().columns:
        kind = column.type
        if pa.types.is_list(kind):
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
            total_N += lengths * (kind.value_type.bit_width // 8) + 4
        elif pa.types.is_fixed_size_list(kind):
            total_N += kind.list_size * (kind.value_type.bit_width // 8)
        elif pa.types.is_string(kind):
            total_N += pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64) + 4
        else:
            total_N += max(kind.bit_width // 8, 1)
    return total_N


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

    def write_group(self, table: pa.Table) -> None:
        """Write rows as one row group of their own."""
        assert not self._pending_rows
        if table.num_rows:
            self._pending = [table.cast(self.schema).cast(self._file_schema)]
            self._pending_rows = table.num_rows
            self._flush(table.num_rows)

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
