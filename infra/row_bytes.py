"""The bytes of each row of a table, used to size row groups."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Integers = npt.NDArray[np.int64]

_OFFSET_BYTES = 4
_UNKNOWN_BYTES = 16


def row_bytes(table: pa.Table) -> Integers:
    """Return the bytes of every row, as Arrow holds it in memory: a function of the row alone.

    A list or text counts its elements and an offset of 4 bytes, a null only the offset; null flags are not counted. A
    value of any other type without a fixed width (a map, a union) counts 16 bytes.

    Returns:
        int64 [N].
    """
    sizes_N = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        at = 0
        for chunk in column.chunks:
            sizes_N[at : at + len(chunk)] += _value_bytes(chunk)
            at += len(chunk)
    return sizes_N


def _value_bytes(values: pa.Array) -> Integers | int:
    """Return the bytes of every value, [N], or one number if all are equal."""
    kind = values.type
    width = _fixed_width(kind)
    if width is not None:
        return width
    if pa.types.is_struct(kind):
        return sum((_value_bytes(field) for field in values.flatten()), np.zeros(len(values), np.int64))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _OFFSET_BYTES + _list_bytes(values)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if any(test(kind) for test in texts):
        return _OFFSET_BYTES + _numbers(pc.binary_length(values))
    return _UNKNOWN_BYTES


def _fixed_width(kind: pa.DataType) -> int | None:
    """Return the bytes of a value, at least one; None if values differ in size."""
    if pa.types.is_fixed_size_list(kind):
        width = _fixed_width(kind.value_type)
        return None if width is None else width * kind.list_size
    if pa.types.is_null(kind):
        return 0
    if pa.types.is_dictionary(kind):
        return _fixed_width(kind.index_type)
    fixed = (pa.types.is_primitive, pa.types.is_decimal, pa.types.is_fixed_size_binary)
    return max(kind.bit_width // 8, 1) if any(test(kind) for test in fixed) else None


def _list_bytes(lists: pa.Array) -> Integers:
    lengths_N = _numbers(pc.list_value_length(lists))
    width = _fixed_width(lists.type.value_type)
    if width is not None:
        return lengths_N * width
    elements = lists.flatten()
    ends_T1 = np.concatenate([[0], np.cumsum(np.broadcast_to(_value_bytes(elements), len(elements)))])
    ends_N = np.cumsum(lengths_N)
    sizes_N: Integers = ends_T1[ends_N] - ends_T1[ends_N - lengths_N]
    return sizes_N


def _numbers(lengths: pa.Array) -> Integers:
    numbers_N: Integers = lengths.fill_null(0).to_numpy().astype(np.int64)
    return numbers_N
