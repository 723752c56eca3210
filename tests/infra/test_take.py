"""`take_rows` returns what Arrow's `take` returns."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestack.infra.take import take_rows

LISTS = st.lists(st.lists(st.none() | st.integers(0, 99), max_size=4), max_size=12)


@settings(max_examples=100)
@given(LISTS, LISTS, st.integers(0, 9), st.booleans(), st.booleans(), st.integers(0, 99))
def test_take_rows_equals_arrows_take(
    first: list[list[int | None]],
    second: list[list[int | None]],
    dropped: int,
    has_null: bool,
    repeats: bool,
    seed: int,
) -> None:
    """Take rows of tables in random order, with and without repeats.

    The tables have two chunks (the first is a slice), and columns of lists of equal and of different lengths, null
    lists, vectors, numbers and strings.
    """
    rows = [*first, *second]

    def column(values: Sequence[object], kind: pa.DataType) -> pa.ChunkedArray:
        return pa.chunked_array([pa.array(values[: len(first)], kind)[dropped:], pa.array(values[len(first) :], kind)])

    table = pa.table(
        {
            "ids": column(rows, pa.list_(pa.int64())),
            "same_lengths": column([[-1.5] * len(row) for row in rows], pa.list_(pa.float32())),
            "other_lengths": column([row[:1] for row in rows], pa.list_(pa.int32())),
            "null_lists": column([None if has_null and len(row) == 2 else row for row in rows], pa.list_(pa.int8())),
            "vectors": column([[1.0, 2.0] if row else None for row in rows], pa.list_(pa.float32(), 2)),
            "number": column(list(range(len(rows))), pa.int64()),
            "name": column([str(row) for row in rows], pa.string()),
        }
    ).replace_schema_metadata({"kept": "yes"})
    rng = np.random.default_rng(seed)
    order = rng.permutation(table.num_rows)[: table.num_rows // 2 + 1]
    if repeats and table.num_rows:
        order = rng.integers(table.num_rows, size=2 * table.num_rows)
    taken = take_rows(table, order)
    assert taken.equals(table.take(pa.array(order)), check_metadata=True)
    assert all(len(column.chunks) <= 1 for column in taken.columns)
    taken.validate(full=True)
