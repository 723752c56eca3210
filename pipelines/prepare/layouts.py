"""Casts from Arrow layouts that polars and others write to the contract's layouts of the same values.

A string with 64-bit offsets is the same string. These casts are lossless; other types are left as they are, so that the
contract's check rejects them.
"""

import pyarrow as pa
from pyarrow import types

from sidestack.infra.errors import DataError
from sidestack.infra.parquet import RowGroup


def contract_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema with every column in the contract's layout."""
    return pa.schema([one.with_type(contract_type(one.type)) for one in schema])


def contract_type(kind: pa.DataType) -> pa.DataType:
    """Return the contract's type for the same values: plain strings, binaries and lists, no dictionaries."""
    if types.is_dictionary(kind):
        return contract_type(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    if types.is_list(kind) or types.is_large_list(kind):  # not list views: pyarrow 25 casts these to broken offsets
        return pa.list_(contract_type(kind.value_type))
    return kind


def in_contract_layout(rows: pa.Table, where: RowGroup) -> pa.Table:
    """Return rows with every column in the contract's layout; values stay as they are.

    Raises:
        DataError: a column has more bytes than 32-bit offsets can count.
    """
    schema = contract_schema(rows.schema)
    if schema.types == rows.schema.types:
        return rows
    try:
        return rows.cast(schema)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: {error}; write smaller row groups") from error
