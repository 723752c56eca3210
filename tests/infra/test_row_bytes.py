"""The bytes of rows equal counts by hand and Arrow's own count."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.row_bytes import row_bytes


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None], pa.int64(), [8, 8]),
        ([1, 2], pa.int8(), [1, 1]),
        ([True, False], pa.bool_(), [1, 1]),
        ([datetime(2024, 1, 1, tzinfo=UTC), None], pa.timestamp("us"), [8, 8]),
        (["", "äb", None], pa.string(), [4, 4 + 3, 4]),
        ([b"abc"], pa.large_binary(), [4 + 3]),
        ([b"abc"], pa.binary(3), [3]),
        ([[1, 2, 3], [], None], pa.list_(pa.int64()), [4 + 24, 4, 4]),
        ([[0.5, 1], None], pa.list_(pa.float16(), 2), [4, 4]),
        ([["a", "bcd"], None, []], pa.list_(pa.string()), [4 + 5 + 7, 4, 4]),
        ([{"a": 1, "b": "xy"}], pa.struct([("a", pa.int32()), ("b", pa.string())]), [4 + 6]),
        ([None], pa.null(), [0]),
        ([[("a", 1)]], pa.map_(pa.string(), pa.int8()), [16]),
    ],
)
def test_bytes_of_a_row_are_the_sum_over_its_values(
    values: list[object], kind: pa.DataType, expected: list[int]
) -> None:
    assert row_bytes(pa.table([pa.array(values, kind)], names=["x"])).tolist() == expected


def test_bytes_do_not_depend_on_chunks() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 100).tolist()
    whole = pa.table({"x": lengths, "list": [[1] * length for length in lengths], "text": ["y" * x for x in lengths]})
    cut = pa.concat_tables([whole.slice(0, 13), whole.slice(13, 50), whole.slice(63)])
    assert row_bytes(cut).tolist() == row_bytes(whole).tolist() == [8 + 4 + 8 * x + 4 + x for x in lengths]
    assert row_bytes(whole).sum() == whole.nbytes


def test_table_without_rows_has_no_bytes() -> None:
    assert row_bytes(pa.table({"x": pa.array([], pa.int64())})).tolist() == []
