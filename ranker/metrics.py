"""How well an arm predicts: exact metrics over a run's prediction files, and the training curve's windows.

The exact metrics are those of `ranker.statistics`, which compares arms with the same code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from infra.tables import TASKS
from ranker.statistics import auc_by_user, task_metrics

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("event_time", pa.timestamp("us"), nullable=False),
        pa.field("click", pa.int8(), nullable=False),
        pa.field("conversion", pa.int8()),
        pa.field("p_click", pa.float32(), nullable=False),
        pa.field("p_conversion", pa.float32(), nullable=False),
    ]
)
"""Predictions of one test row. `p_conversion` is the chance of a conversion given a click, so `conversion` is null
where there was no click, as where its follow-up is not complete: a null label is not judged."""


def prediction_metrics(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Measure both tasks on all rows of the prediction files.

    Args:
        files: Parquet files of `PREDICTION_SCHEMA`.

    Returns:
        task -> ne, auc, calibration, num, positives; gauc, gauc_users, gauc_rows (AUC within users who have both
        labels, weighted by rows). What is not defined is None, and `reason` says why.
    """
    columns = ["user_id", *TASKS, *(f"p_{task}" for task in TASKS)]
    parts = [pq.read_table(file, columns=columns) for file in files]
    table = pa.concat_tables(parts)
    measured = {}
    for task in TASKS:
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
    """Sums the steps between two points of the learning curve."""

    def __init__(self) -> None:
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
        for i, task in enumerate(TASKS):
            loss = losses_T[i] / counts_T[i] if counts_T[i] else float("nan")
            rate = positives_T[i] / counts_T[i] if counts_T[i] else 0.0
            values[f"train_{task}_loss"] = float(loss)
            values[f"train_{task}_ne"] = float(loss / _entropy(rate)) if 0 < rate < 1 else float("nan")
        return values


def _entropy(rate: float) -> float:
    return float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))
