import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from infra.errors import ConfigError, DataError
from infra.tables import (
    SPEC_FILE,
    TIME,
    DatasetSpec,
    event_schema,
    flat_schema,
    label_schema,
    read_spec,
    request_schema,
    write_spec,
)
from tests.infra.made_up import TWO_TASKS as SPEC


def test_a_bad_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.json: cannot be read"):
        read_spec(tmp_path / SPEC_FILE)
    (tmp_path / "dataset.json").write_text(
        SPEC.model_dump_json().replace('"test":["2020-01-03"', '"test":["2020-01-02"')
    )
    with pytest.raises(ConfigError, match="must end before test"):
        read_spec(tmp_path / SPEC_FILE)


def test_a_column_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="events: column 'click' is named twice"):
        DatasetSpec(**{**SPEC.model_dump(), "dense": ("click",)})


@pytest.mark.parametrize(
    ("tasks", "rule"),
    [
        ({"buy": {"given": "click"}}, "tasks.buy.given: 'click' is no task; tasks are buy"),
        ({"a": {"given": "b"}, "b": {"given": "a"}}, "tasks.a.given: the tasks are given each other in a circle"),
        ({"Buy!": {}}, "tasks.Buy!: must be of a-z"),
        ({"a": {"weight": 0}}, "greater than 0"),
    ],
)
def test_tasks_that_cannot_be_are_named(tasks: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(rule)):
        DatasetSpec.model_validate({**SPEC.model_dump(), "tasks": tasks})


def test_a_followup_of_no_task_is_named() -> None:
    with pytest.raises(ValueError, match="followup_days.buy: is no task; tasks are click, conversion"):
        DatasetSpec(**{**SPEC.model_dump(), "followup_days": {"buy": 2}})


@pytest.mark.parametrize(
    "sizes", [{"num_items": 0}, {"num_users": -1}, {"sparse": {"store": 0}}, {"embeddings": {"text_embedding": 0}},
              {"categoricals": {"brand": 0}}, {"user_categoricals": {"age": -3}}, {"request_sparse": {"hour": 0}}],
)  # fmt: skip
def test_sizes_that_no_table_can_have_are_named(sizes: dict[str, Any]) -> None:
    (key,) = sizes
    with pytest.raises(ValueError, match=rf"{key}[\s\S]*greater than"):
        DatasetSpec.model_validate({**SPEC.model_dump(), **sizes})


def test_ancestors_of_a_task_come_nearest_first() -> None:
    tasks = {"click": {}, "cart": {"given": "click"}, "buy": {"given": "cart"}}
    spec = DatasetSpec.model_validate({**SPEC.model_dump(), "tasks": tasks})
    assert spec.ancestors("buy") == ("cart", "click") and spec.ancestors("click") == ()


def test_history_times_are_stored_as_microseconds() -> None:
    assert request_schema(SPEC).field("history_times").type == pa.list_(TIME)


def test_a_spec_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_spec(tmp_path, SPEC)
    assert read_spec(tmp_path / SPEC_FILE) == SPEC


def test_joined_rows_have_the_columns_of_requests_events_and_labels_once() -> None:
    spec = DatasetSpec(**{**SPEC.model_dump(), "request_dense": ("age",), "request_sparse": {"hour": 24}})
    names = [*request_schema(spec).names, *event_schema(spec).names, *label_schema(spec).names]
    assert flat_schema(spec).names == list(dict.fromkeys(names)) and names.count("request_id") == 2
    assert {"age", "hour", "history_times"} <= set(request_schema(spec).names)
    assert event_schema(spec).names == ["request_id", "item_id", "popularity", "store"]
    assert spec.all_dense == ("popularity", "age") and spec.all_sparse == {"store": 7, "hour": 24}


def test_a_description_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / SPEC_FILE).write_text("[1]")
    with pytest.raises(DataError, match=r"dataset\.json: must hold a JSON object, holds a list"):
        read_spec(tmp_path / SPEC_FILE)
