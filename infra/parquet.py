"""Parquet files: row groups in global row coordinates, and a deterministic writer.

Files are written with checksums of pages and footer, and read with a check of those that they have: a bit that flips
after a file was verified causes an error, never another value (docs/integrity.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sidestack.infra.errors import DataError
from sidestack.infra.footer import read_footer


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file, and the place of its rows among all rows of the files it was listed with.

    Attributes:
        path: the file. index: the row group's number in it.
        start: the global number of its first row. rows: the number of rows.
    """

    path: Path
    index: int
    start: int
    rows: int

    def __str__(self) -> str:
        """Return file and row group as text for errors."""
        return f"{self.path}, row group {self.index}"


def open_parquet(path: Path, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Open a Parquet file, with verification of its page checksums; the footer is read unless it is passed in.

    Raises:
        DataError: the file is missing, truncated or not Parquet, or its footer was altered.
    """
    footer = footer or read_footer(path)
    try:
        file = pq.ParquetFile(path, metadata=footer, page_checksum_verification=True)
        _ = file.schema_arrow  # raises if names are not text: another writer's footer has no checksum
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
    """Check that a schema has some columns.

    Raises:
        DataError: a column is missing; names file, row group and column.
    """
    for column in columns:
        if column not in schema.names:
            raise DataError(f"{where}: column {column!r} is missing; the file has {schema.names}")


def read_row_group(
    group: RowGroup, columns: Sequence[str] | None = None, footer: pq.FileMetaData | None = None
) -> pa.Table:
    """Read one row group, all columns or those named; its file's footer is read unless it is passed in.

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
"""The prefix of this project's metadata keys."""
_LIST_SIZE = _OURS + b"list_size"
PRECISION = _OURS + b"precision"


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema as stored on disk, in types that other readers of Parquet support; `_restored` undoes it.

    Fixed-size lists become plain lists with the size in their metadata: pyarrow up to 25 writes a null fixed-size list
    to Parquet but cannot read it again (apache/arrow#35692). Half precision becomes float32 with a note in its
    metadata: Spark does not support FLOAT16. This project's metadata of a column, including its SID spec, is repeated
    as a key-value of the file, `<key>.<column>`: only Arrow reads the metadata of a field.
    """
    fields, file_metadata = [], dict(schema.metadata or {})
    for field in schema:
        metadata, kind = dict(field.metadata or {}), field.type
        if pa.types.is_fixed_size_list(kind):
            metadata[_LIST_SIZE] = str(kind.list_size).encode()
            kind = pa.list_(kind.value_type)
        if pa.types.is_float16(element_of(kind)):
            metadata[PRECISION] = b"half"
            kind = _with_element(kind, pa.float32())
        fields.append(field.with_type(kind).with_metadata(metadata or None))
        name = field.name.encode()
        file_metadata |= {key + b"." + name: value for key, value in metadata.items() if key.startswith(_OURS)}
    return pa.schema(fields, file_metadata or None)


def element_of(kind: pa.DataType) -> pa.DataType:
    """Return the type of a list's elements; for another type the type itself."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind.value_type if any(test(kind) for test in lists) else kind


def _with_element(kind: pa.DataType, element: pa.DataType) -> pa.DataType:
    """Return the type of the list with another element type; for another type the element type itself."""
    if pa.types.is_list(kind):
        return pa.list_(element)
    return pa.large_list(element) if pa.types.is_large_list(kind) else element


def _restored(table: pa.Table) -> pa.Table:
    """Undo `stored_schema` on a table that was read."""
    schema = restored_schema(table.schema)
    if schema == table.schema:  # a cast to the same type takes time, too
        return table.replace_schema_metadata(schema.metadata)
    return table.cast(schema)


def restored_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema of a file's rows after reading: the one that its `TableWriter` was given."""
    fields = []
    for field in schema:
        metadata, kind = dict(field.metadata or {}), field.type
        if metadata.pop(PRECISION, None):
            kind = _with_element(kind, pa.float16())
        if _LIST_SIZE in metadata:
            kind = pa.list_(kind.value_type, int(metadata.pop(_LIST_SIZE)))
        fields.append(field.with_type(kind).with_metadata(metadata or None))
    further = {key: value for key, value in (schema.metadata or {}).items() if not key.startswith(_OURS)}
    return pa.schema(fields, further or None)
