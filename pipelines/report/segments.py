"""Segments of the held-out rows, by the number of earlier positives of one task of the user and of the item.

The second paper reports gains by these, because content should help most where little is known. Positives are counted
in the training dates, for the first task without a parent.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sidestack.infra.checks import check_events
from sidestack.infra.errors import DataError
from sidestack.infra.impressions import read_impressions
from sidestack.infra.snapshot import Dataset
from sidestack.infra.tables import DatasetSpec, TaskSpec
from sidestack.pipelines.report.comparison import LabelCounts
from sidestack.ranker.statistics import Rows

Integers = NDArray[np.int64]

SEGMENTS = ("0", "1-2", "3-9", "10+")
"""Ranges of earlier positives, as in the paper."""
_FROM = np.array([1, 3, 10])
"""Minimum number of positives of each segment but the first."""


def first_root(tasks: Mapping[str, TaskSpec]) -> str:
    """Return the first task without a parent."""
    return next(name for name, task in tasks.items() if task.given is None)


@dataclass(frozen=True)
class EarlierPositives:
    """Counts of positives in the training dates.

    Attributes:
        by: `user` and `item` -> number of positives by id.
    """

    by: Mapping[str, Integers]

    def segments(self, rows: Rows, path: Path) -> dict[str, Integers]:
        """Return each row's index in `SEGMENTS`, by its user and by its item.

        Args:
            rows: of the predictions of `path`, which is named in errors.

        Raises:
            DataError: an id is not in the dataset's table.
        """
        found = {}
        for kind, positives_I in self.by.items():
            ids_M = rows.ids[kind]
            outside_M = ids_M[(ids_M < 0) | (ids_M >= len(positives_I))]
            if len(outside_M):
                rule = f"is outside the dataset's table [0, {len(positives_I)})"
                raise DataError(f"{path}/predictions: {kind}_id {outside_M[0]} {rule}")
            found[kind] = np.searchsorted(_FROM, positives_I[ids_M], side="right")
        return found


def count_labels(
    tables: Iterable[pa.Table], spec: DatasetSpec, earlier_task: str
) -> tuple[EarlierPositives, dict[str, LabelCounts]]:
    """Count labels of the training dates.

    Args:
        tables: batches of rows with `user_id`, `item_id` and every task's label, such as those of `training_rows`.
        spec: the dataset's, with the numbers of users and items.
        earlier_task: the task whose positives are counted by user and by item.

    Returns:
        the number of positives of `earlier_task` by user and by item; and, by task, the counts of judged rows.
    """
    by = {"user": np.zeros(spec.num_users, np.int64), "item": np.zeros(spec.num_items, np.int64)}
    counts_T2 = np.zeros((len(spec.tasks), 2), np.int64)
    for table in tables:
        positives = table.filter(pc.equal(table[earlier_task], 1))
        for kind, positives_I in by.items():
            np.add.at(positives_I, positives[f"{kind}_id"].to_numpy(), 1)
        counts_T2 += [_judged_counts(table, spec, task) for task in spec.tasks]
    judged = zip(spec.tasks, counts_T2.tolist(), strict=True)
    return EarlierPositives(by), {task: LabelCounts(rows=rows, positives=found) for task, (rows, found) in judged}


def _judged_counts(table: pa.Table, spec: DatasetSpec, task: str) -> tuple[int, int]:
    """Return the number of rows on which a task is judged (all ancestors' labels are 1), and of positives."""
    for ancestor in spec.ancestors(task):
        table = table.filter(pc.equal(table[ancestor], 1))
    label = table[task]
    return len(label) - label.null_count, pc.sum(pc.equal(label, 1)).as_py() or 0


def training_rows(dataset: Dataset, first: date, last: date) -> Iterator[pa.Table]:
    """Read ids and labels of the dates from `first` to `last`, inclusive, a row group at a time.

    Raises:
        DataError: there are no events, or they break the tables' contract.
    """
    columns = ["user_id", "item_id", *dataset.spec.tasks]
    return read_impressions(dataset, columns, first, last, lambda rows, where: check_events(rows, dataset.spec, where))
