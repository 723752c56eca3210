"""Counts known before a row's date: impressions and positives by user, by item, by category.

Counts are of whole dates. A row's features use the impressions of earlier dates, and the labels of those earlier dates
whose follow-up was over before the row's date began (`DatasetSpec.followup_days`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]

SMOOTHING = 20.0
"""Every rate is smoothed with this many rows of the overall rate."""


@dataclass(frozen=True)
class _Counted:
    """Counted rows of one date, by id, and the first date whose features may use them."""

    known_on: date
    group: str
    measure: int
    ids: Integers
    counts: Integers


class EarlierCounts:
    """Running counts over dates in order: `begin` a date, query and add its rows, begin the next.

    Added rows count from a later date on, so that rows of one date do not see each other. Memory: 8 bytes per id for
    the impressions and for two counts per task, and the counts of dates whose follow-up is not over.

    Args:
        sizes: the groups, name -> number of ids.
        followup_days: of each task, in order: days after an impression until the label is known.
    """

    def __init__(self, sizes: Mapping[str, int], followup_days: Sequence[float]) -> None:
        # Measure 0 is impressions; then, per task, the judged rows and the positives among them.
        self._waits = (0, *(math.ceil(days) for days in followup_days for _ in range(2)))
        self._known = {group: np.zeros((len(self._waits), size), np.int64) for group, size in sizes.items()}
        self._totals_M = np.zeros(len(self._waits), np.int64)
        self._waiting: list[_Counted] = []

    def begin(self, day: date) -> None:
        """Start a date: add the counts that are known when it begins."""
        due = [one for one in self._waiting if one.known_on <= day]
        self._waiting = [one for one in self._waiting if one.known_on > day]
        for one in due:
            if one.group:
                self._known[one.group][one.measure, one.ids] += one.counts
            else:
                self._totals_M[one.measure] += one.counts.sum()

    def add(self, day: date, ids: Mapping[str, Integers], labels_TN: NDArray[np.int8]) -> None:
        """Count rows of the current date.

        Args:
            day: the date. ids: of each group; negative: none.
            labels_TN: of each task; negative: not judged.
        """
        every_N = np.ones(labels_TN.shape[1], np.bool_)
        counted = [every_N, *(is_it_N for label_N in labels_TN for is_it_N in (label_N >= 0, label_N > 0))]
        for measure, (is_counted_N, wait) in enumerate(zip(counted, self._waits, strict=True)):
            known_on = day + timedelta(days=1 + wait)
            total = np.array([is_counted_N.sum()])
            self._waiting.append(_Counted(known_on, "", measure, np.zeros(1, np.int64), total))
            for group, ids_N in ids.items():
                found, counts = np.unique(ids_N[is_counted_N & (ids_N >= 0)], return_counts=True)
                self._waiting.append(_Counted(known_on, group, measure, found, counts))

    def log_impressions(self, group: str, ids_N: Integers) -> Floats:
        """Return log(1 + impressions) of ids; NaN where there is none."""
        return _where_known(ids_N, np.log1p(self._known[group][0, ids_N]))

    def log_positives(self, group: str, ids_N: Integers, task: int) -> Floats:
        """Return log(1 + positives) of ids on a task, by its place; NaN where there is no id."""
        return _where_known(ids_N, np.log1p(self._known[group][2 + 2 * task, ids_N]))

    def rate(self, group: str, ids_N: Integers, task: int) -> Floats:
        """Return the share of positives among the judged rows of ids, smoothed towards the share over all rows.

        NaN where there is no id, and until some row of any id is judged.
        """
        judged, positives = self._totals_M[1 + 2 * task : 3 + 2 * task].tolist()
        overall = positives / judged if judged else math.nan
        judged_N, positives_N = self._known[group][1 + 2 * task : 3 + 2 * task, ids_N]
        return _where_known(ids_N, (positives_N + SMOOTHING * overall) / (judged_N + SMOOTHING))


def _where_known(ids_N: Integers, values_N: NDArray[np.float64]) -> Floats:
    return np.where(ids_N >= 0, values_N, np.nan).astype(np.float32)
