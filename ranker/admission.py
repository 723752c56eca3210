"""Which ids have a row of their own in a table of bounded size: admission by count, eviction by age.

The first rows of such a table are fallback rows: ids without a row of their own share them, by modulo. The other rows
go to ids that were seen often enough. An id keeps its row, even if other ids are seen more often, until it was not seen
for some days. Then its count starts again at 0, and the row is free.
"""

from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sidestack.ranker.config import AdmissionConfig

Integers = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32]

NEVER = 0
"""Stands for a date on which nothing was seen or counted."""
_NO_ID = -1


class Turnover(NamedTuple):
    """The changes of one admission.

    Attributes:
        admitted: ids that got a row of their own. evicted: ids that lost theirs.
        waiting: ids that were seen often enough but found no free row.
        own_rows: rows that belong to an id afterwards.
    """

    admitted: int
    evicted: int
    waiting: int
    own_rows: int


@dataclass
class IdRows:
    """The rows of a table's ids, and the counts and dates that decide them.

    Attributes:
        row_I: the row each id is looked up in, int32: its own, or one of the fallback rows.
        count_I: how often the id was seen since it was new or last evicted, int32.
        last_seen_I: the date on which it was last seen, as a calendar ordinal, int32; `NEVER`: not yet.
        counted_to: the last date that was counted, likewise.
    """

    row_I: Rows
    count_I: Rows
    last_seen_I: Rows
    counted_to: int = NEVER

    @classmethod
    def empty(cls) -> "IdRows":
        """Return rows without any id."""
        return cls(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32))

    def grow(self, num_ids: int, fallback_rows: int) -> None:
        """Add new ids, up to `num_ids` in all."""
        new_N = np.arange(len(self.row_I), num_ids)
        self.row_I = np.append(self.row_I, (new_N % fallback_rows).astype(np.int32))
        self.count_I = np.append(self.count_I, np.zeros(len(new_N), np.int32))
        self.last_seen_I = np.append(self.last_seen_I, np.full(len(new_N), NEVER, np.int32))

    def add_counts(self, ids_N: Integers, counts_N: Integers, day: date) -> None:
        """Add the counts of distinct ids seen on a date; dates come in order."""
        most = np.iinfo(np.int32).max
        self.count_I[ids_N] = np.minimum(self.count_I[ids_N] + counts_N, most)
        self.last_seen_I[ids_N] = day.toordinal()

    def admit(self, settings: AdmissionConfig, today: date) -> Turnover:
        """Evict ids that were not seen for long, and assign the free rows to ids that were seen often.

        If rows are too few, ids with a higher count come first; among equal counts, lower ids.

        Args:
            settings: the table's, with as many fallback rows as in `grow`. today: the last date that was counted.
        """
        fallback = settings.fallback_rows
        has_own_I = self.row_I >= fallback
        self.counted_to = today.toordinal()
        is_old_I = (self.last_seen_I != NEVER) & (self.counted_to - self.last_seen_I >= settings.max_age_days)
        self.count_I[is_old_I] = 0
        evicted = np.flatnonzero(is_old_I & has_own_I)
        self.row_I[evicted] = evicted % fallback
        has_own_I[evicted] = False
        candidates = np.flatnonzero(~has_own_I & (self.count_I >= settings.min_count))
        by_count = candidates[np.argsort(-self.count_I[candidates].astype(np.int64), kind="stable")]
        is_free_R = np.ones(settings.max_rows, bool)
        is_free_R[:fallback] = False
        is_free_R[self.row_I[has_own_I]] = False
        free = np.flatnonzero(is_free_R)
        admitted = by_count[: len(free)]
        self.row_I[admitted] = free[: len(admitted)]
        own_rows = int(has_own_I.sum()) + len(admitted)
        return Turnover(len(admitted), len(evicted), len(candidates) - len(admitted), own_rows)


def reassigned_rows(before_I: Rows, after_I: Rows, rows: int, fallback_rows: int) -> Integers:
    """Return the rows that belong to an id that did not have them before, ascending.

    Args:
        before_I, after_I: the row of each id; `after_I` may have more ids. rows: the table's number of rows.
        fallback_rows: how many of them belong to no id.
    """
    before_R, after_R = (_owners(row_I, rows, fallback_rows) for row_I in (before_I, after_I))
    return np.flatnonzero((after_R != _NO_ID) & (after_R != before_R))


def _owners(row_I: Rows, rows: int, fallback_rows: int) -> Integers:
    """Return the id that each row belongs to."""
    id_R = np.full(rows, _NO_ID, np.int64)
    own = np.flatnonzero(row_I >= fallback_rows)
    id_R[row_I[own]] = own
    return id_R
