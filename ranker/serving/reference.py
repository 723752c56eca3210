"""Requests made from held-out rows, and a check of a served ranker's answers against the ranker's predictions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.errors import SpecError
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.rows import Rows, RowSource
from sidestack.infra.snapshot import Dataset
from sidestack.infra.tables import DatasetSpec
from sidestack.ranker.bundle_description import Description
from sidestack.ranker.export_config import RankerExportConfig
from sidestack.ranker.metrics import log_loss_ne
from sidestack.ranker.predictions import FOLDER as PREDICTIONS
from sidestack.ranker.serving.model import ServedRanker
from sidestack.ranker.spans import open_impressions

Request = dict[str, Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """Requests of held-out rows, and the ranker's predictions of these rows.

    Attributes:
        requests: as JSON values. p_TN: probabilities by task, of the rows of all requests.
        labels_TN: likewise, NaN where not judged.
    """

    requests: list[Request]
    p_TN: Floats
    labels_TN: Floats


class Found(NamedTuple):
    """How far a version's answers are from the ranker's predictions.

    Attributes:
        largest_difference: the largest difference of two probabilities.
        ne: for tables below float32, normalized entropy of the ranker and of the version, by task; only tasks with both
            labels on these rows.
    """

    largest_difference: float
    ne: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        """Return a short text of the differences."""
        changes = [f"{task} {100 * (after / before - 1):+.3f} %" for task, (before, after) in self.ne.items()]
        apart = f"at most {self.largest_difference:.1g} from the ranker's own"
        return f"{apart}; NE {', '.join(changes)}" if changes else apart


def read_reference(dataset: Dataset, described: Description, ranker: Path, rows: int) -> Reference:
    """Make requests from the first held-out rows, and read the ranker's predictions of them.

    Args:
        dataset: the snapshot. described: the ranker's description. ranker: its stage's output.
        rows: the minimum number of rows; all if there are fewer.

    Raises:
        SpecError: the snapshot's rows are not those that the ranker predicted.
    """
    features, tasks = described.features(), tuple(described.spec.tasks)
    holdout = described.config.holdout
    dates, columns = holdout.windows(described.spec)[1], (*features.columns, "request_id")
    held_out = open_impressions(dataset, dates, holdout.measured_labels, columns)
    requests: list[Request] = []
    ids: list[tuple[int, int]] = []
    for request in _requests(held_out, described.spec):
        requests.append(json.loads(json.dumps(request)))
        ids += [(request["user"]["user_id"], one["item_id"]) for one in request["candidates"]]
        if len(ids) >= rows:
            break
    predicted = map(read_row_group, row_groups(sorted((ranker / PREDICTIONS).glob("*.parquet"))))
    held = pa.concat_tables(rows.filter(pc.field("row") < len(ids)) for rows in predicted).sort_by("row")
    if [*zip(held["user_id"].to_pylist(), held["item_id"].to_pylist(), strict=True)] != ids:
        raise SpecError(f"{dataset.path}: its held-out rows are not those that the ranker predicted")
    p_TN = np.stack([held[f"p_{task}"].to_numpy() for task in tasks])
    labels_TN = np.stack([held[task].cast(pa.float32()).to_numpy() for task in tasks])
    return Reference(requests, p_TN, labels_TN)


def _requests(rows: RowSource, spec: DatasetSpec) -> Iterator[Request]:
    for group in rows.groups(0, rows.num_rows):
        yield from _of_group(rows.read(group), spec)


def _of_group(rows: Rows, spec: DatasetSpec) -> Iterator[Request]:
    assert rows.shared is not None
    own = rows.own.select(["item_id", *spec.dense, *spec.sparse]).to_pylist()
    starts_R = rows.run_starts.tolist()
    ends_R = [*starts_R[1:], len(own)]
    names = ["user_id", "event_time", "history_item_ids", "history_times", *spec.request_dense, *spec.request_sparse]
    for shared, start, end in zip(rows.shared.select(names).to_pylist(), starts_R, ends_R, strict=True):
        history = {
            "item_ids": shared.pop("history_item_ids"),
            "times": [time.isoformat() for time in shared.pop("history_times")],
        }
        time = shared.pop("event_time").isoformat()
        yield {"user": shared, "time": time, "history": history, "candidates": own[start:end]}


def check(served: ServedRanker, reference: Reference, config: RankerExportConfig) -> Found:
    """Check a version against the ranker's own predictions.

    Raises:
        SpecError: a probability, or below float32 a task's NE, differs by more than the configuration allows.
    """
    tasks = tuple(served.features.tasks)
    answers = [served.answer(request, f"request {n}") for n, request in enumerate(reference.requests)]
    p_TN = np.array([[p for one in answers for p in one["probabilities"][task]] for task in tasks], np.float32)
    apart = float(np.abs(p_TN - reference.p_TN).max())
    if config.tables == "float32":
        if apart > config.tolerance:
            raise SpecError(
                f"the saved model's probabilities are up to {apart:.2g} from the ranker's; ranker_export.tolerance is"
                f" {config.tolerance:g}"
            )
        return Found(apart, {})
    labels = zip(tasks, reference.p_TN, p_TN, reference.labels_TN, strict=True)
    ne = {
        task: (log_loss_ne(before_N, labels_N), log_loss_ne(after_N, labels_N))
        for task, before_N, after_N, labels_N in labels
    }
    ne = {task: both for task, both in ne.items() if not np.isnan(both).any()}  # some task may have one label only
    if not ne:
        raise SpecError(
            f"no task has both labels on the {p_TN.shape[1]} held-out rows that were answered: what {config.tables}"
            " tables cost cannot be measured"
        )
    for task, (before, after) in ne.items():
        if after > before * (1 + config.max_ne_loss):
            raise SpecError(
                f"{config.tables} tables raise the NE of {task} from {before:.5f} to {after:.5f}, by more than"
                f" ranker_export.max_ne_loss={config.max_ne_loss:g} of it"
            )
    return Found(apart, ne)
