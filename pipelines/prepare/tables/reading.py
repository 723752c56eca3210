"""Readers of a file's rows and columns in the contract's layout.

Embeddings may come as fixed-size lists or as plain lists of the right length. Where some are null they must be
plain lists: pyarrow up to 25 writes null fixed-size lists but cannot read them (apache/arrow#35692). Columns may have
any Arrow layout of their type (`pipelines.prepare.layouts`).
"""

from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.checks import require_distinct_columns
from sidestack.infra.errors import DataError
from sidestack.infra.parquet import RowGroup, open_parquet, read_row_group, restored_schema
from sidestack.infra.tables import ContentSpec
from sidestack.pipelines.prepare.layouts import contract_schema, in_contract_layout


def schema_of_rows(path: Path) -> pa.Schema | None:
    """Return the schema of a file as it is read; None if it has no row group."""
    with open_parquet(path) as file:
        if not file.metadata.num_row_groups:
            return None
        return contract_schema(restored_schema(file.schema_arrow))


def _schema(path: Path) -> pa.Schema:
    """Return the schema of a file as it is read; raise if two columns have one name."""
    with open_parquet(path) as file:
        require_distinct_columns(file.schema_arrow, path)
        return contract_schema(restored_schema(file.schema_arrow))


def with_fixed_sizes(found: pa.Schema, expected: pa.Schema) -> pa.Schema:
    """Return a schema in which embeddings that are plain lists of numbers have the required fixed size."""
    for one in expected:
        place = found.get_field_index(one.name)
        if place >= 0 and pa.types.is_fixed_size_list(one.type) and _is_list_of_numbers(found.field(place).type):
            kind = pa.list_(found.field(place).type.value_type, one.type.list_size)
            found = found.set(place, found.field(place).with_type(kind))
    return found


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) and pa.types.is_floating(kind.value_type))


def output_schema(path: Path, expected: pa.Schema) -> pa.Schema:
    """Return the schema in which a file of items or users is stored."""
    return _with_further(_schema(path), expected)


def _with_further(found: pa.Schema, expected: pa.Schema) -> pa.Schema:
    """Return the contract's columns, followed by a file's further columns sorted by name."""
    further = sorted(set(found.names) - set(expected.names))
    return pa.schema([*expected, *(pa.field(name, found.field(name).type) for name in further)])


def ordered(rows: pa.Table, expected: pa.Schema) -> pa.Table:
    """Return rows with the contract's columns first, then further columns sorted by name."""
    schema = _with_further(rows.schema, expected)
    return rows.select(schema.names).cast(schema)


def read(group: RowGroup, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a row group, or some of its columns, in the contract's layout.

    Raises:
        DataError: the row group cannot be read, or has a column twice.
    """
    try:
        rows = read_row_group(group, columns)
        require_distinct_columns(rows.schema, group)
        return in_contract_layout(rows, group)
    except DataError as error:
        if "Expected all lists to be of size" in str(error):
            raise DataError(
                f"{error}; write embeddings with nulls as plain lists (pyarrow cannot read null fixed-size lists)"
            ) from error
        raise


def conformed(content: pa.Table, expected: pa.Schema, group: RowGroup) -> pa.Table:
    """Convert embeddings from plain lists to fixed-size lists."""
    for one in expected:
        place = content.schema.get_field_index(one.name)
        is_embedding = pa.types.is_fixed_size_list(one.type)
        if is_embedding and place >= 0 and pa.types.is_list(content.schema.field(place).type):
            column = content[one.name]
            lengths = pc.list_value_length(column).drop_null().unique().to_pylist()
            if any(length != one.type.list_size for length in lengths):
                raise DataError(
                    f"{group}: column {one.name!r}: embeddings must have {one.type.list_size} numbers; "
                    f"found lengths {sorted(lengths)}"
                )
            fixed = pa.list_(column.type.value_type, one.type.list_size)
            content = content.set_column(place, pa.field(one.name, fixed), column.cast(fixed))
    return content


HALF = (float(np.finfo(np.float16).tiny), float(np.finfo(np.float16).max))
"""The smallest and largest normal number in half precision."""


def require_half_precision(rows: pa.Table, content: ContentSpec, group: RowGroup) -> None:
    """Check that the largest number of each embedding is a normal half-precision number, or that all are 0."""
    low, high = HALF
    for name in content.embeddings:
        for chunk in rows[name].chunks:
            values_ND = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, chunk.type.list_size)
            if values_ND.dtype == np.float16:
                continue
            largest_N = np.abs(values_ND).max(axis=1, initial=0.0)
            wrong_M = largest_N[(largest_N > high) | ((largest_N < low) & (largest_N > 0))]
            if len(wrong_M):
                raise DataError(
                    f"{group}: column {name!r}: the largest number of an embedding is {wrong_M[0]:.3g}; embeddings are"
                    f" stored in half precision, so it must lie in [{low:.3g}, {high:.0f}], or all numbers be 0:"
                    " scale them"
                )


def check_date(content: pa.Table, day: date, group: RowGroup) -> None:
    """Check that all rows of a date's file are on that date.

    Raises:
        DataError: names the first row that is not.
    """
    wrong = np.flatnonzero(content["event_time"].to_numpy().astype("datetime64[D]") != np.datetime64(day))
    if len(wrong):
        found = content["event_time"][int(wrong[0])]
        rule = f"must lie on {day}, its folder's date; row {wrong[0]} has {found}"
        raise DataError(f"{group}: column 'event_time': {rule}")
