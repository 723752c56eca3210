"""Held-out predictions of one arm, and the check that two arms predicted the same rows.

A comparison is paired only when every arm scored the same impressions with the same labels; anything else would
put a difference of data into the difference of arms.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra.errors import DataError
from infra.parquet import RowGroup, read_row_group, row_groups
from infra.tables import TASKS

Integers = NDArray[np.int64]

IDENTITY = ("row", "user_id", "item_id")
NO_LABEL = -1


@dataclass(frozen=True)
class Predictions:
    """The held-out rows of one arm, in the order of the dataset.

    Attributes:
        path: the arm's directory.
        identity: `row` (number in the held-out files), `user_id`, `item_id`, each int64 [N].
        labels: for each task 0, 1 or, where the row is not judged (null), `NO_LABEL`; int8 [N].
        probabilities: for each task the predicted chance of label 1, float64 [N].
    """

    path: Path
    identity: dict[str, Integers]
    labels: dict[str, NDArray[np.int8]]
    probabilities: dict[str, NDArray[np.float64]]

    def __len__(self) -> int:
        """Give the number of rows."""
        return len(self.identity["row"])


def read_predictions(path: Path) -> Predictions:
    """Read `predictions/*.parquet` of a ranker's output, whatever ranks wrote it, and sort by `row`.

    Args:
        path: the ranker's committed directory. Each task has there a label column of its name, and `p_<task>`.

    Raises:
        DataError: no file, a missing column, a null, a label outside {0, 1}, a probability outside [0, 1],
            or a row that was predicted twice.
    """
    files = sorted(Path(path).glob("predictions/*.parquet"))
    if not files:
        raise DataError(f"{path}/predictions: holds no Parquet file")
    columns = [*IDENTITY, *TASKS, *(f"p_{task}" for task in TASKS)]
    parts = [_checked(read_row_group(group, columns), group) for group in row_groups(files)]
    if not parts:
        raise DataError(f"{path}/predictions: holds no row")
    table = pa.concat_tables(parts).sort_by("row")
    rows_N = _integers(table, "row")
    twice_N = rows_N[1:][np.diff(rows_N) == 0]
    if len(twice_N):
        raise DataError(f"{path}/predictions: row {twice_N[0]} was predicted more than once")
    return Predictions(
        path=Path(path),
        identity={name: _integers(table, name) for name in IDENTITY},
        labels={task: pc.fill_null(table[task], NO_LABEL).to_numpy() for task in TASKS},
        probabilities={task: np.asarray(table[f"p_{task}"].to_numpy(), np.float64) for task in TASKS},
    )


def _checked(table: pa.Table, group: RowGroup) -> pa.Table:
    for name in (*IDENTITY, *(f"p_{task}" for task in TASKS)):
        if table[name].null_count:
            raise DataError(f"{group}: column {name!r} has {table[name].null_count} nulls; none may be")
    for task in TASKS:
        label = table[task]
        known = pc.is_in(label, pa.array([0, 1, None], label.type))
        _refuse(label, known, task, group, "0, 1 or null")
        score = table[f"p_{task}"]
        inside = pc.and_(pc.greater_equal(score, 0.0), pc.less_equal(score, 1.0))
        _refuse(score, inside, f"p_{task}", group, "a probability in [0, 1]")
    return table


def _refuse(values: pa.ChunkedArray, good: pa.ChunkedArray, name: str, group: RowGroup, rule: str) -> None:
    bad = values.filter(pc.invert(good))
    if len(bad):
        raise DataError(f"{group}: column {name!r} holds {bad[0].as_py()!r}; must be {rule}")


def _integers(table: pa.Table, name: str) -> Integers:
    return np.asarray(table[name].to_numpy(), np.int64)


def require_same_rows(arm: Predictions, reference: Predictions) -> None:
    """Check that an arm predicted the reference's rows, for the same users, items and labels.

    Raises:
        DataError: naming both directories, the first row that differs, and in what.
    """
    both = f"{arm.path} and {reference.path} cannot be paired"
    if len(arm) != len(reference):
        raise DataError(f"{both}: {len(arm):,} predicted rows against {len(reference):,}")
    mine: dict[str, NDArray[np.integer]] = {**arm.identity, **arm.labels}
    expected: dict[str, NDArray[np.integer]] = {**reference.identity, **reference.labels}
    for name, expected_N in expected.items():
        differs_N = np.flatnonzero(mine[name] != expected_N)
        if len(differs_N):
            at = differs_N[0]
            raise DataError(
                f"{both}: row {reference.identity['row'][at]} has {name} {mine[name][at]} against {expected_N[at]}"
            )
