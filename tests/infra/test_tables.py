"""The dataset's specification: validation, the schemas of its tables, and reading JSON."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.tables import (
    SPEC_FILE,
    TIME,
    DatasetSpec,
    event_schema,
    flat_schema,
    label_schema,
    read_json,
    read_spec,
    request_schema,
    write_spec,
)
from tests.infra.made_up import TWO_TASKS as SPEC


def test_missing_or_invalid_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.json: cannot be read"):
        read_spec(tmp_path / SPEC_FILE)
    (tmp_path / "dataset.json").write_text(
        SPEC.model_dump_json().replace('"test":["2020-01-03"', '"test":["2020-01-02"')
    )
    with pytest.raises(ConfigError, match="must end before test"):
        read_spec(tmp_path / SPEC_FILE)


def test_duplicate_column_is_refused() -> None:
    with pytest.raises(ValueError, match="events: column 'click' is named twice"):
        DatasetSpec(**{**SPEC.model_dump(), "dense": ("click",)})


@pytest.mark.parametrize(
    ("tasks", "rule"),
    [
        ({"buy": {"given": "click"}}, "tasks.buy.given: 'click' is no task; tasks are buy"),
        ({"a": {"given": "b"}, "b": {"given": "a"}}, "tasks.a.given: the tasks are given each other in a circle"),
        ({"Buy!": {}}, "must be of a-z, 0-9 and _, as a column is named after it"),
        ({"a": {"weight": 0}}, "greater than 0"),
    ],
)
def test_invalid_tasks_are_refused(tasks: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(rule)):
        DatasetSpec.model_validate({**SPEC.model_dump(), "tasks": tasks})


def test_followup_days_of_an_unknown_task_are_refused() -> None:
    with pytest.raises(ValueError, match="followup_days.buy: is no task; tasks are click, conversion"):
        DatasetSpec(**{**SPEC.model_dump(), "followup_days": {"buy": 2}})


@pytest.mark.parametrize(
    "sizes", [{"num_items": 0}, {"num_users": -1}, {"sparse": {"store": 0}}, {"embeddings": {"text_embedding": 0}},
              {"categoricals": {"brand": 0}}, {"user_categoricals": {"age": -3}}, {"request_sparse": {"hour": 0}},
              {"max_history": -1}],
)  # fmt: skip
def test_sizes_that_are_too_small_are_refused(sizes: dict[str, Any]) -> None:
    (key,) = sizes
    with pytest.raises(ValueError, match=rf"{key}[\s\S]*greater than"):
        DatasetSpec.model_validate({**SPEC.model_dump(), **sizes})


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"sparse": {"store": 2**63}}, "less than 9223372036854775808"),
        ({"num_items": 2**63}, "less than 9223372036854775808"),
        ({"embeddings": {"text_embedding": 2**31}}, "less than 2147483648"),
        ({"categoricals": {"brand": 2**31}}, "less than 2147483648"),
        ({"max_history": 2**31}, "less than 2147483648"),
        ({"followup_days": {"click": 36_501}}, "less than or equal to 36500"),
        ({"train": ["0001-01-01", "2024-01-02"]}, "greater than or equal to 1900-01-01"),
        ({"test": ["2024-02-01", "9999-12-31"]}, "less than 2900-01-01"),
    ],
)
def test_sizes_and_dates_out_of_range_are_refused(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        DatasetSpec.model_validate({**SPEC.model_dump(), **values})


@pytest.mark.parametrize("name", ["", "a\nb", "a\x00b", "\u2028"])
def test_column_name_with_control_characters_is_refused(name: str) -> None:
    for column in ("sparse", "embeddings", "user_categoricals", "request_sparse"):
        with pytest.raises(ValueError, match="must be a column's name, without control characters"):
            DatasetSpec.model_validate({**SPEC.model_dump(), column: {name: 3}})
    with pytest.raises(ValueError, match="must be a column's name, without control characters"):
        DatasetSpec.model_validate({**SPEC.model_dump(), "dense": [name]})


def test_dot_in_the_name_of_a_sparse_column_is_refused() -> None:
    for column in ("sparse", "request_sparse"):
        with pytest.raises(ValueError, match="must be without a dot, as a part of the model is named after it"):
            DatasetSpec.model_validate({**SPEC.model_dump(), column: {"page.section": 3}})
    DatasetSpec.model_validate({**SPEC.model_dump(), "categoricals": {"page.section": 3}, "dense": ["price.usd"]})


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"[1]", "must hold a JSON object, holds a list"),
        (b"-1", "must hold a JSON object, holds a int"),
        (b"null", "must hold a JSON object, holds a NoneType"),
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON: maximum recursion depth"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON: Exceeds the limit"),
        (b'{"a": 9223372036854775808}', "a: needs more than 64 bits"),
        (b'{"a": {"b": [NaN, Infinity]}}', "a.b.0: nan is no finite number\n.*a.b.1: inf is no finite number"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "cannot be read as JSON: key 'b' occurs twice in one object"),
        (b'{"a": "Gr\xf6\xdfe"}', "cannot be read as JSON: 'utf-8' codec"),
        ('{"a": 1}'.encode("utf-16"), "cannot be read as JSON: 'utf-8' codec"),
        (b'{"a": "\\ud800"}', "a: .*half of a surrogate pair"),
        (b'{"a": "\\u0000"}', "a: .*has a NUL character"),
        (b'{"\\udcff": 1}', ".*: the key has a NUL character or half of a surrogate pair"),
    ],
)
def test_invalid_json_is_named(content: bytes, rule: str, tmp_path: Path) -> None:
    file = tmp_path / "dataset.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"dataset\.json: {rule}"):
        read_json(file)


def test_byte_order_mark_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_bytes(b"\xef\xbb\xbf" + SPEC.model_dump_json().encode())
    assert read_spec(tmp_path / "dataset.json") == SPEC


def test_ancestors_of_a_task_are_ordered_nearest_first() -> None:
    tasks = {"click": {}, "cart": {"given": "click"}, "buy": {"given": "cart"}}
    spec = DatasetSpec.model_validate({**SPEC.model_dump(), "tasks": tasks})
    assert spec.ancestors("buy") == ("cart", "click") and spec.ancestors("click") == ()


def test_history_times_are_stored_as_microseconds() -> None:
    assert request_schema(SPEC).field("history_times").type == pa.list_(TIME)


def test_spec_is_read_as_written(tmp_path: Path) -> None:
    write_spec(tmp_path, SPEC)
    assert read_spec(tmp_path / SPEC_FILE) == SPEC


def test_flat_schema_has_each_column_of_the_tables_once() -> None:
    spec = DatasetSpec(**{**SPEC.model_dump(), "request_dense": ("age",), "request_sparse": {"hour": 24}})
    names = [*request_schema(spec).names, *event_schema(spec).names, *label_schema(spec).names]
    assert flat_schema(spec).names == list(dict.fromkeys(names)) and names.count("request_id") == 2
    assert {"age", "hour", "history_times"} <= set(request_schema(spec).names)
    assert event_schema(spec).names == ["request_id", "item_id", "popularity", "store"]
    assert spec.all_dense == ("popularity", "age") and spec.all_sparse == {"store": 7, "hour": 24}


def test_description_that_is_not_an_object_is_named(tmp_path: Path) -> None:
    (tmp_path / SPEC_FILE).write_text("[1]")
    with pytest.raises(DataError, match=r"dataset\.json: must hold a JSON object, holds a list"):
        read_spec(tmp_path / SPEC_FILE)
