"""How well an arm predicts: exact metrics over a run's prediction files, and the training curve's windows.

The exact metrics are those of `ranker.statistics`, which compares arms with the same code.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ranker.statistics import auc_by_user, task_metrics


def prediction_schema(tasks: Iterable[str]) -> pa.Schema:
    """Return the schema of predictions, one row a held-out row: for each task `<task>`, its label, and `p_<task>`.

    `p_<task>` is the probability of a task given that its ancestors happened. So the label is null where some
    ancestor's is not 1, as where it is not known itself: a null label is not judged.
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


def prediction_metrics(files: Sequence[Path], tasks: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Measure every task on all rows of the prediction files.

    Args:
        files: Parquet files of `prediction_schema`. tasks: what they predict.

    Returns:
        task -> ne, auc, calibration, num, positives; gauc, gauc_users, gauc_rows (AUC within users who have both
        labels, weighted by rows). What is not defined is None, and `reason` says why.
    """
    names = tuple(tasks)
    columns = ["user_id", *names, *(f"p_{name}" for name in names)]
    parts = [pq.read_table(file, columns=columns) for file in files]
    table = pa.concat_tables(parts)
    measured = {}
    for task in names:
        judged = table.filter(table[task].is_valid())
        labels_N, scores_N = judged[task].to_numpy(), judged[f"p_{task}"].to_numpy()
        metrics = asdict(task_metrics(labels_N, scores_N))
        users = auc_by_user(judged["user_id"].to_numpy(), labels_N, scores_N)
        within = {"gauc": users.gauc, "gauc_users": len(users.users_V), "gauc_rows": int(users.rows_V.sum())}
        measured[task] = metrics | within | _reason(task, metrics)
    return measured


def _reason(task: str, metrics: Mapping[str, Any]) -> dict[str, str]:
    num, positives = metrics["num"], metrics["positives"]
    if num == 0:
        return {"reason": f"no row has a complete {task} label"}
    if positives in (0, num):
        kind = "positive" if positives == 0 else "negative"
        return {"reason": f"none of the {num} {task} labels is {kind}: normalized entropy and AUC are not defined"}
    return {}


class TrainingWindow:
    """Sums of the steps between two points of the learning curve.

    Args of the constructor:
        tasks: the tasks' names, in the order of the totals.
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        self._tasks = tuple(tasks)
        self._totals_3T: Tensor | None = None

    def add(self, totals_3T: Tensor) -> None:
        """Add one step's totals (see `ranker.model.StepOutput`)."""
        self._totals_3T = totals_3T if self._totals_3T is None else self._totals_3T + totals_3T

    def state(self) -> dict[str, Tensor]:
        """Give what a checkpoint has to keep of the window, the same on every rank."""
        return {} if self._totals_3T is None else {"window": self._totals_3T}

    def load_state(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take up what `state` gave."""
        self._totals_3T = tensors["window"].to(device) if "window" in tensors else None

    def take(self) -> dict[str, float]:
        """Give the window's mean loss and NE by task, NaN where not defined, and start the next window."""
        assert self._totals_3T is not None
        losses_T, counts_T, positives_T = self._totals_3T.cpu().numpy()
        self._totals_3T = None
        values = {}
        for i, task in enumerate(self._tasks):
            loss = losses_T[i] / counts_T[i] if counts_T[i] else float("nan")
            rate = positives_T[i] / counts_T[i] if counts_T[i] else 0.0
            values[f"train_{task}_loss"] = float(loss)
            values[f"train_{task}_ne"] = float(loss / _entropy(rate)) if 0 < rate < 1 else float("nan")
        return values


def _entropy(rate: float) -> float:
    return float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))
