"""Prediction quality of an arm: exact metrics over a run's prediction files, and the training curve's windows.

The exact metrics are those of `ranker.metric_registry`; comparisons of arms use the same code.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestack.infra.rows import Rows
from sidestack.infra.tables import TaskSpec, ancestors
from sidestack.ranker.convert import as_array
from sidestack.ranker.measures import TaskMeasures, measure_task
from sidestack.ranker.predictions import sorted_predictions, sorting
from sidestack.ranker.spans import mask_uncounted


def prediction_schema(tasks: Iterable[str]) -> pa.Schema:
    """Return the schema of predictions, one row per held-out row: for each task `<task>`, its label, and `p_<task>`.

    `p_<task>` is the probability of a task given that its ancestors happened. The label is therefore null if an
    ancestor's label is not 1, or if it is not known itself; a null label is not judged.
    """
    names = tuple(tasks)
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("user_id", pa.int64(), nullable=False),
            pa.field("item_id", pa.int64(), nullable=False),
            pa.field("event_time", pa.timestamp("us"), nullable=False),
            *(pa.field(name, pa.int8()) for name in names),
            *(pa.field(f"p_{name}", pa.float32(), nullable=False) for name in names),
        ]
    )


def prediction_rows(
    rows: Rows, rows_N: NDArray[np.int64], p_TN: Iterable[NDArray[np.float32]], tasks: Mapping[str, TaskSpec]
) -> pa.Table:
    """Return predicted rows in `prediction_schema`.

    Args:
        rows: with ids, time and labels. rows_N: their numbers, counted from the first held-out row.
        p_TN: predicted probabilities by task. tasks: the predicted tasks.
    """
    columns = [
        pa.array(rows_N),
        *(rows.column(name) for name in ("user_id", "item_id", "event_time")),
        *(judged_label(rows.own, tasks, task) for task in tasks),
        *(pa.array(p_N) for p_N in p_TN),
    ]
    return pa.table(columns, schema=prediction_schema(tasks))


def judged_label(table: pa.Table, tasks: Mapping[str, TaskSpec], task: str) -> pa.Array:
    """Return a task's label, null where not all of its ancestors happened, or where it does not count."""
    label = mask_uncounted(table, task, as_array(table, task))
    for ancestor in ancestors(tasks, task):
        label = pc.if_else(pc.equal(as_array(table, ancestor), 1), label, None)
    return label


def prediction_metrics(path: Path, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measure every task on all rows of a ranker's output.

    Args:
        path: the directory that holds `predictions/`; sorting on disk also uses it.
        tasks: each has a label column of its name, null where the row is not judged, and a column `p_<task>`.

    Returns:
        task -> num and positives (of the judged rows), the value of each of `all_metrics` by its name, and a metric's
        counts as `<metric>_<count>`. An undefined value is None, and `reason` explains it.

    Raises:
        DataError: the predictions break their contract; see `ranker.predictions.sorted_predictions`.
    """
    with sorting(path) as database, sorted_predictions(path, tasks, database) as predictions:
        return {task: _task_values(task, measure_task(predictions, task)) for task in tasks}


def _task_values(task: str, measured: TaskMeasures) -> dict[str, Any]:
    values: dict[str, Any] = {"num": measured.num, "positives": measured.positives}
    for name, measure in measured.metrics.items():
        values[name] = measure.value
        values |= {f"{name}_{count}": number for count, number in measure.counts.items()}
    return values | _undefined_reason(task, measured)


def _undefined_reason(task: str, measured: TaskMeasures) -> dict[str, str]:
    num, positives = measured.num, measured.positives
    if num == 0:
        return {"reason": f"no row has a complete {task} label"}
    if positives in (0, num):
        kind = "positive" if positives == 0 else "negative"
        return {"reason": f"none of the {num} {task} labels is {kind}: normalized entropy and AUC are not defined"}
    return {}


def named_metrics(kind: str, measured: Mapping[str, Mapping[str, Any]], metrics: Iterable[str]) -> dict[str, float]:
    """Return the defined metrics of `prediction_metrics` as `<kind>_<task>_<metric>`."""
    return {
        f"{kind}_{task}_{metric}": values[metric]
        for task, values in measured.items()
        for metric in metrics
        if values[metric] is not None
    }


class TrainingWindow:
    """Sums of the steps between two points of the learning curve.

    Args of the constructor:
        tasks: the tasks' names, in the order of the totals. name: the prefix of its values' names.
    """

    def __init__(self, tasks: Iterable[str], name: str = "train") -> None:
        self._tasks = tuple(tasks)
        self._name = name
        self._totals_3T: Tensor | None = None

    def add(self, totals_3T: Tensor) -> None:
        """Add one step's totals (see `ranker.model.StepOutput`)."""
        self._totals_3T = totals_3T if self._totals_3T is None else self._totals_3T + totals_3T

    def state(self) -> dict[str, Tensor]:
        """Return the window's state for a checkpoint, the same on every rank."""
        return {} if self._totals_3T is None else {"window": self._totals_3T}

    def load_state(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore what `state` returned."""
        self._totals_3T = tensors["window"].to(device) if "window" in tensors else None

    def take(self) -> dict[str, float]:
        """Return the window's mean loss and NE by task, NaN where not defined, and start the next window."""
        assert self._totals_3T is not None
        losses_T, counts_T, positives_T = self._totals_3T.cpu().numpy()
        self._totals_3T = None
        values = {}
        for i, task in enumerate(self._tasks):
            loss = losses_T[i] / counts_T[i] if counts_T[i] else float("nan")
            values[f"{self._name}_{task}_loss"] = float(loss)
            values[f"{self._name}_{task}_ne"] = normalized_entropy(losses_T[i], counts_T[i], positives_T[i])
        return values


def normalized_entropy(loss: float, count: float, positives: float) -> float:
    """Return the mean log loss over the entropy of the base rate; NaN unless both labels occur.

    Args:
        loss: the sum of log losses, in nats. count: number of labels. positives: number of positives among them.
    """
    if not 0 < positives < count:
        return float("nan")
    rate = positives / count
    return float(loss / count / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def log_loss_ne(p_N: NDArray[np.float32], labels_N: NDArray[np.float32]) -> float:
    """Return the normalized entropy of probabilities; NaN unless both labels occur.

    Args:
        p_N: in [0, 1]. labels_N: 0 or 1, NaN where a row is not judged.
    """
    is_judged_N = ~np.isnan(labels_N)
    chances_N = np.clip(p_N[is_judged_N].astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -np.where(labels_N[is_judged_N] > 0, np.log(chances_N), np.log1p(-chances_N)).sum()
    return normalized_entropy(float(loss), int(is_judged_N.sum()), float(labels_N[is_judged_N].sum()))
