"""The checks of rows: each error names file, row group, column and rule."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.checks import check_events, check_items, check_users, require_same_columns, require_typed_columns
from sidestack.infra.errors import DataError
from sidestack.infra.parquet import RowGroup
from sidestack.infra.tables import DatasetSpec, flat_schema, item_schema, user_schema
from tests.infra.made_up import TWO_TASKS as SPEC

WHERE = RowGroup(Path("events/part.parquet"), 2, 0, 2)
NOW = datetime(2020, 1, 1, 12)
BEFORE = datetime(2020, 1, 1, 11)


def events(**changes: Any) -> pa.Table:
    columns: dict[str, Any] = {
        "request_id": [7, 8],
        "event_time": [NOW, NOW],
        "user_id": [0, 4],
        "item_id": [9, 0],
        "click": [0, 1],
        "conversion": [None, 1],
        "popularity": [0.0, 1.5],
        "store": [[6], []],
        "history_item_ids": [[1, 2], []],
        "history_times": [[BEFORE, BEFORE], []],
    }
    types = {field.name: field.type for field in flat_schema(SPEC)}
    return pa.table(
        {
            name: changes[name]
            if isinstance(changes.get(name), pa.Array)
            else pa.array(changes.get(name, value), types[name])
            for name, value in columns.items()
        }
    )


def items(**changes: Any) -> pa.Table:
    vectors = changes.get("vector", [[0.5, 1.0], None])
    return pa.table(
        {
            "item_id": pa.array(changes.get("item_id", [0, 1]), pa.int64()),
            "vector": pa.array(
                [None if v is None else np.array(v, np.float16) for v in vectors], pa.list_(pa.float16(), 2)
            ),
            "brand": pa.array(changes.get("brand", [2, None]), pa.int32()),
        }
    )


def test_valid_rows_pass() -> None:
    check_events(events(), SPEC, WHERE)
    check_items(items(), SPEC, WHERE)
    check_users(pa.table({"user_id": pa.array([0, 1]), "age": pa.array([3, None], pa.int32())}), SPEC, WHERE)


def test_user_embeddings_are_checked_as_item_embeddings() -> None:
    spec = SPEC.model_copy(update={"user_embeddings": {"activity": 2}})
    assert user_schema(spec).names == ["user_id", "activity", "age"]
    rows = [{"user_id": 0, "activity": [1.0, 2.0], "age": 3}, {"user_id": 1, "activity": [0.0, float("inf")]}]
    table = pa.Table.from_pylist(rows, schema=user_schema(spec, pa.float32()))
    check_users(table.slice(0, 1), spec, WHERE)
    with pytest.raises(DataError, match="column 'activity': must be finite; holds inf"):
        check_users(table, spec, WHERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"click": [0, 2]}, "'click': label 2 is not 0 or 1"),
        ({"conversion": [-1, None]}, "'conversion': label -1"),
        ({"item_id": [10, 0]}, r"'item_id': id 10 is outside the table \[0, 10\)"),
        ({"user_id": [-1, 0]}, "'user_id': id -1 is outside"),
        ({"user_id": pa.array([1, 2], pa.int32())}, "'user_id' has type int32, must be int64"),
        ({"popularity": [np.nan, 0]}, "'popularity': must be finite; holds nan"),
        ({"popularity": [None, 0]}, "'popularity': must not be null"),
        ({"store": [[7], []]}, r"'store': id 7 is outside the table \[0, 7\)"),
        ({"store": [[None], []]}, "'store': must hold no null inside a list"),
        ({"history_item_ids": [[1], []]}, "'history_times': must have as many entries"),
        ({"history_times": [[BEFORE, NOW], []]}, "'history_times': must lie strictly before event_time; row 0"),
        ({"history_times": [[BEFORE, datetime(2019, 1, 1)], []]}, "'history_times': must be oldest first"),
        ({"history_times": [[BEFORE, None], []]}, "'history_times': must hold no null inside a list"),
        ({"history_times": [[datetime(2030, 1, 1), None], []]}, "'history_times': must hold no null inside a list"),
        ({"history_times": [None, []]}, "'history_times': must not be null"),
        ({"request_id": [None, 1]}, "'request_id': must not be null; is null in 1 rows, first in row 0"),
        (
            {"click": [0, 0]},
            "'conversion': must not be 1 where 'click' is 0, which it is given; is in 1 rows, first in row 1",
        ),
        (
            {"history_item_ids": [[1] * 4, []], "history_times": [[BEFORE] * 4, []]},
            "'history_times': has 4 entries, more than max_history=3",
        ),
    ],
)
def test_broken_rule_of_events_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"events/part\.parquet, row group 2: column " + message):
        check_events(events(**changes), SPEC, WHERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vector": [[0.5, np.nan], None]}, "'vector': must be finite; holds nan"),
        ({"vector": [[0.5, np.inf], None]}, "'vector': must be finite; holds inf"),
        ({"brand": [3, 0]}, "'brand': id 3 is outside"),
        ({"item_id": [1, 1]}, "'item_id': ids must rise; row 1 has 1 after 1"),
        ({"item_id": [0, 10]}, r"'item_id': id 10 is outside the table \[0, 10\)"),
    ],
)
def test_broken_rule_of_items_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_items(items(**changes), SPEC, WHERE)


def test_values_under_a_null_embedding_are_ignored() -> None:
    values = pa.array(np.array([0.5, 1.0, np.nan, np.nan], np.float16))
    vectors = pa.FixedSizeListArray.from_arrays(values, 2, mask=pa.array([False, True]))
    check_items(pa.table({"vector": vectors}), SPEC, WHERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda schema: schema.remove(schema.get_field_index("click")),
            "column 'click' is missing; expected type int8",
        ),
        (
            lambda schema: schema.set(schema.get_field_index("event_time"), pa.field("event_time", pa.string())),
            "column 'event_time' has type string",
        ),
    ],
)
def test_column_with_a_wrong_type_is_named(change: Callable[[pa.Schema], pa.Schema], message: str) -> None:
    with pytest.raises(DataError, match=message):
        require_typed_columns(change(flat_schema(SPEC)), flat_schema(SPEC), WHERE)


def test_float32_embeddings_and_further_columns_are_allowed() -> None:
    schema = item_schema(SPEC, pa.float32()).append(pa.field("sid", pa.int64()))
    require_typed_columns(schema, item_schema(SPEC), WHERE)
    require_typed_columns(user_schema(SPEC), user_schema(SPEC), WHERE)


def test_error_for_an_embedding_of_another_type_names_the_valid_types() -> None:
    schema = pa.schema({"item_id": pa.int64(), "text": pa.string(), "vector": pa.list_(pa.int64(), 2)})
    wanted = r"a list of 2 numbers of type float32 \(or float16, float64\)"
    with pytest.raises(DataError, match=rf"'vector' has type fixed_size_list<.*int64>\[2\], must be {wanted}"):
        require_typed_columns(schema, item_schema(SPEC), WHERE)
    with pytest.raises(DataError, match=f"'vector' is missing; expected type {wanted}"):
        require_typed_columns(schema.remove(2), item_schema(SPEC), WHERE)


def test_label_is_valid_when_its_parents_label_is_null() -> None:
    check_events(events(click=[None, None], conversion=[1, 0]), SPEC, WHERE)
    check_events(events(click=[1, 0], conversion=[None, None]), SPEC, WHERE)


def test_columns_of_a_single_table_are_checked() -> None:
    rows = events(click=[0, 2])
    check_events(rows.select(["request_id", "item_id"]), SPEC, WHERE)
    check_events(rows.select(["history_item_ids", "history_times"]), SPEC, WHERE)
    with pytest.raises(DataError, match="'click': label 2"):
        check_events(rows.select(["click"]), SPEC, WHERE)


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        ({"a": pa.int64()}, "column 'b' is missing, in known it is double"),
        ({"a": pa.int64(), "b": pa.float32()}, "column 'b' is float, in known it is double"),
        ({"c": pa.int8(), "b": pa.float64(), "a": pa.int64()}, "column 'c' is int8, in known it is missing"),
    ],
)
def test_different_columns_are_named(names: dict[str, pa.DataType], rule: str) -> None:
    known = pa.schema({"a": pa.int64(), "b": pa.float64()})
    with pytest.raises(DataError, match=f"own: {rule}: all files of a table must have the same columns"):
        require_same_columns(pa.schema(names), known, "own", "known")
    swapped = pa.schema([known.field("b"), known.field("a").with_nullable(False)])
    require_same_columns(swapped, known, "own", "known")


def test_type_of_a_parents_label_is_checked_when_the_child_comes_first() -> None:
    tasks = {"conversion": {"given": "click"}, "click": {}}
    spec = DatasetSpec.model_validate({**SPEC.model_dump(), "tasks": tasks})
    check_events(events(click=[None, 1], conversion=[1, 1]), spec, WHERE)  # the parent's label is null
    with pytest.raises(DataError, match="'click' has type string, must be int8"):
        check_events(events(click=pa.array(["yes", "no"]), conversion=[1, 1]), spec, WHERE)
