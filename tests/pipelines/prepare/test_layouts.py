"""Other layouts of the same values are converted to the contract's without changing a value."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.pipelines.prepare.layouts import contract_type, in_contract_layout

TEXTS, LISTS = ["a", None, "", "b"], [[1, 2], None, [], [3]]
ENCODED = pa.dictionary(pa.int32(), pa.string())
NOT_NULL = pa.field("item", pa.int64(), nullable=False)


@pytest.mark.parametrize(
    ("kind", "plain", "values"),
    [
        (pa.large_string(), pa.string(), TEXTS),
        (pa.string_view(), pa.string(), TEXTS),
        (ENCODED, pa.string(), TEXTS),
        (pa.large_binary(), pa.binary(), [b"a", None]),
        (pa.binary_view(), pa.binary(), [b"a", None]),
        (pa.large_list(pa.int64()), pa.list_(pa.int64()), LISTS),
        (pa.list_(NOT_NULL), pa.list_(pa.int64()), LISTS),
        (pa.large_list(pa.large_string()), pa.list_(pa.string()), [["a", None], None]),
        (pa.large_list(pa.timestamp("us")), pa.list_(pa.timestamp("us")), [None, []]),
        (pa.list_(ENCODED), pa.list_(pa.string()), [["a", "b"], None]),
    ],
)
def test_a_file_in_another_layout_has_the_same_values(
    kind: pa.DataType, plain: pa.DataType, values: list[Any], tmp_path: Path
) -> None:
    column = encoded_lists(values) if kind == pa.list_(ENCODED) else pa.array(values, kind)
    pq.write_table(pa.table({"n": [*range(len(values))], "x": column}), tmp_path / "x.parquet")
    (group,) = row_groups([tmp_path / "x.parquet"])
    written = read_row_group(group)
    assert written.schema.field("x").type == kind
    rows = in_contract_layout(written, group)
    assert contract_type(kind) == plain == rows.schema.field("x").type
    assert rows["x"].to_pylist() == values and rows["n"].to_pylist() == [*range(len(values))]


def encoded_lists(values: list[Any]) -> pa.Array:
    """Return lists of dictionary-encoded texts, which pyarrow cannot convert from Python values."""
    lists = pa.array(values, pa.list_(pa.string()))
    return pa.ListArray.from_arrays(lists.offsets, lists.values.dictionary_encode(), mask=lists.is_null())


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.int32(),
        pa.uint64(),
        pa.list_(pa.int32()),
        pa.list_(pa.float32(), 4),
        pa.timestamp("ns", "UTC"),
        pa.list_view(pa.int64()),
    ],
)
def test_other_types_are_not_converted(kind: pa.DataType) -> None:
    assert contract_type(kind) == kind
