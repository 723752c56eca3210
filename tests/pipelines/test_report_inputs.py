"""The curves and encoder metrics that the report reads."""

import json
from pathlib import Path

import pytest

from sidestack.infra.errors import DataError
from sidestack.pipelines.report.encoder import read_encoder
from sidestack.pipelines.report.outputs import Curve, learning_curve, read_curves


def test_learning_curve_is_the_training_ne_of_the_task() -> None:
    curve: Curve = [(1.0, 0.5)]
    curves: dict[str, Curve] = {
        "test_click_ne": [(9.0, 0.4)], "train_click_loss": [], "train_click_ne": curve,
        "train_conversion_ne": [(2.0, 0.9)], "learning_rate": [],
    }  # fmt: skip
    assert learning_curve(curves, "click") == curve
    assert learning_curve({"train_click_late_ne": curve}, "click") == []  # of a task whose name has the same prefix


def test_curves_leave_out_nulls(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 1, "a": null, "b": 2}\n{"step": 2, "a": 0.5}\n')
    assert read_curves(tmp_path) == {"a": [(2.0, 0.5)], "b": [(1.0, 2.0)]}
    assert read_curves(tmp_path / "nowhere") == {}
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"a": 1}\n')
    with pytest.raises(DataError, match=r"history.jsonl, line 2: must be a JSON object with a step"):
        read_curves(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"holdout": {"digits": 3}})])
def test_encoder_without_metrics_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(DataError, match="summary.json"):
        read_encoder(tmp_path)
