"""Run the comparison stage, and change the predictions that it reads."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa

from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.compare import compare
from sidestack.pipelines.report.config import CompareConfig
from tests.pipelines import fabricated
from tests.pipelines.fabricated import WORLD, predictions, ranker_output, truth


def run_compare(inputs: dict[str, Path], out: Path, draw: bool = False, **config: Any) -> dict[str, Any]:
    """Run the stage's body on one rank and return `comparison.json`; `draw` draws the figures, which take seconds."""
    out.mkdir()
    settings = CompareConfig(**{"resamples": 200, **config})
    drawing = nullcontext() if draw else patch("sidestack.pipelines.compare.plots", return_value=())
    with drawing:
        compare(StageRun(settings, inputs, out, WORLD, RunLog(out)))
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def over_none(comparison: dict[str, Any], arm: str, task: str, metric: str) -> dict[str, Any]:
    """Return an arm's gain over the arm `none`."""
    found: dict[str, Any] = comparison["arms"][arm]["tasks"][task]["metrics"][metric]["over"]["none"]
    return found


def judged(drawn: dict[str, Any], table: pa.Table, task: str) -> tuple[Any, Any, Any]:
    """Return the labels, scores and users of the rows that have a label of a task."""
    keep = drawn[task] >= 0
    return drawn[task][keep], table[f"p_{task}"].to_numpy()[keep], drawn["user_id"][keep]


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def altered(path: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Commit the arm `side` with its predictions changed."""
    return ranker_output(path, "side", change(predictions(truth(), fabricated.ARMS["side"], 2)))


def one_value(name: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    """Change one row's value of a column."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        return with_column(table, name, pa.array(values, table.schema.field(name).type))

    return change
