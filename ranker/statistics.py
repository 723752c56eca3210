"""Exact metrics of one arm on one task, summed over batches of rows: memory grows with the users, not with the rows.

A *tally* takes rows batch by batch and returns a `Measure`. Each documents the order that its rows must have. Results
do not depend on how rows are cut into batches: counts are integers, and floats are added row by row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

EPSILON = 1e-12
"""Probabilities are kept this far from 0 and 1, as in torchrec's normalized entropy."""

DECILES = 10


class Rows(NamedTuple):
    """A batch of a task's judged rows, of one arm.

    Attributes:
        users_M: the place of each row's user among the task's users, 0 to U - 1.
        ids: `user` and `item` -> each row's id, int64 [M].
        labels_M: 0 or 1.
        scores_M: the predicted probability of label 1.
    """

    users_M: Integers
    ids: dict[str, Integers]
    labels_M: NDArray[np.int8]
    scores_M: Floats

    def where(self, chosen_M: NDArray[np.bool_]) -> "Rows":
        """Return the chosen rows."""
        ids = {kind: ids_M[chosen_M] for kind, ids_M in self.ids.items()}
        return Rows(self.users_M[chosen_M], ids, self.labels_M[chosen_M], self.scores_M[chosen_M])


class Measure(NamedTuple):
    """A metric's result over all rows.

    Attributes:
        value: the metric's value; None if it is not defined on these rows.
        parts_U: each user's part of a total that is proportional to the value; the factor depends only on labels. A
            gain is a ratio of two arms' totals, so the factor cancels, also when users are resampled.
        counts: the numbers of users and rows behind the value, if these are not all of the task's users and rows.
    """

    value: float | None
    parts_U: Floats
    counts: dict[str, int] = {}


class Tally(Protocol):
    """Sums over batches of rows."""

    def add(self, rows: Rows) -> None:
        """Take the next rows."""

    def measure(self) -> Measure:
        """Return the result over all rows; called once, after the last."""


def log_loss(labels_N: NDArray[np.generic], probabilities_N: NDArray[np.floating]) -> Floats:
    """Return each row's log loss in nats, with probabilities clipped `EPSILON` away from 0 and 1.

    Args:
        labels_N: 0 or 1.
        probabilities_N: the predicted probability of label 1.
    """
    p_N = np.clip(probabilities_N.astype(np.float64), EPSILON, 1.0 - EPSILON)
    return -np.where(labels_N.astype(bool), np.log(p_N), np.log1p(-p_N))


class RowTally:
    """A metric that is a sum of one value per row, divided by a function of the labels; rows in any fixed order.

    Args:
        num_users: users U of the task.
        value: labels and scores -> the value of each row.
        scale: number of rows and of positives -> the divisor of the sum; None if the metric is not defined.
    """

    def __init__(
        self,
        num_users: int,
        value: Callable[[NDArray[np.int8], Floats], Floats],
        scale: Callable[[int, int], float | None],
    ) -> None:
        self._value, self._scale = value, scale
        self._sums_U = np.zeros(num_users)
        self._num = self._positives = 0

    def add(self, rows: Rows) -> None:
        """Take the next rows."""
        # Unlike bincount, add.at continues the sums of earlier batches, so the result is the same bit for bit.
        np.add.at(self._sums_U, rows.users_M, self._value(rows.labels_M, rows.scores_M))
        self._num += len(rows.labels_M)
        self._positives += int(rows.labels_M.sum())

    def measure(self) -> Measure:
        """Return the metric, and each user's sum."""
        scale = self._scale(self._num, self._positives)
        return Measure(None if scale is None else float(self._sums_U.sum()) / scale, self._sums_U)


def entropy_of_base_rate(num: int, positives: int) -> float | None:
    """Return the log loss, summed over `num` rows, of always predicting their rate of positives.

    Returns:
        None unless both a positive and a negative row exist.
    """
    if not 0 < positives < num:
        return None
    rate = positives / num
    return float(-num * (rate * np.log(rate) + (1.0 - rate) * np.log1p(-rate)))


class _Cells(NamedTuple):
    """Counts of rows instead of rows: how many positives and negatives a user has at a score."""

    users_C: Integers
    scores_C: Floats
    positives_C: Integers
    negatives_C: Integers

    def part(self, part: slice) -> "_Cells":
        return _Cells(self.users_C[part], self.scores_C[part], self.positives_C[part], self.negatives_C[part])

    def followed_by(self, more: "_Cells") -> "_Cells":
        return _Cells(
            np.concatenate([self.users_C, more.users_C]),
            np.concatenate([self.scores_C, more.scores_C]),
            np.concatenate([self.positives_C, more.positives_C]),
            np.concatenate([self.negatives_C, more.negatives_C]),
        )


class _Pairs:
    """Integer counts of pairs whose positive row is scored above the negative one: 2 per such pair, 1 per tie.

    Memory: users, and a batch. Rows of the latest score are held back, as counts by user, until a batch has another
    score: a constant prediction is one tie of all rows.

    Args:
        num_users: users U of the task.
        within_users: whether only pairs of one user count; rows then come by (user, score), else by score.
    """

    def __init__(self, num_users: int, *, within_users: bool) -> None:
        self._within_users = within_users
        groups = num_users if within_users else 1
        self._positives_G, self._negatives_G = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
        self.positives_U, self.negatives_U = np.zeros(num_users, np.int64), np.zeros(num_users, np.int64)
        self.below_positives_U, self.below_negatives_U = np.zeros(num_users, np.int64), np.zeros(num_users, np.int64)
        self._held = _Cells(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))

    def add(self, rows: Rows) -> None:
        """Take the next rows, in order."""
        if not len(rows.users_M):
            return
        labels_M = rows.labels_M.astype(np.int64)
        new = _Cells(rows.users_M, rows.scores_M, labels_M, 1 - labels_M)
        cells = self._held.followed_by(new)
        last_C = cells.scores_C == cells.scores_C[-1]
        if self._within_users:
            last_C &= cells.users_C == cells.users_C[-1]
        start = len(last_C) - int(last_C.sum())
        self._count(cells.part(slice(0, start)))
        self._held = _by_user(cells.part(slice(start, None)))

    def finish(self) -> None:
        """Count the rows held back."""
        self._count(self._held)

    def _count(self, cells: _Cells) -> None:
        if not len(cells.users_C):
            return
        users_C, positives_C, negatives_C = cells.users_C, cells.positives_C, cells.negatives_C
        group_C = users_C if self._within_users else np.zeros_like(users_C)
        starts_R = np.flatnonzero(_differs_from_last(group_C) | _differs_from_last(cells.scores_C))
        run_C = np.repeat(np.arange(len(starts_R)), np.diff(starts_R, append=len(users_C)))
        group_R = group_C[starts_R]
        negatives_below_R = _twice_below(np.add.reduceat(negatives_C, starts_R), group_R, self._negatives_G)
        positives_below_R = _twice_below(np.add.reduceat(positives_C, starts_R), group_R, self._positives_G)
        for sums_U, values_C in (
            (self.positives_U, positives_C),
            (self.negatives_U, negatives_C),
            (self.below_positives_U, positives_C * negatives_below_R[run_C]),
            (self.below_negatives_U, negatives_C * positives_below_R[run_C]),
        ):
            np.add.at(sums_U, users_C, values_C)


def _twice_below(counts_R: Integers, group_R: Integers, seen_G: Integers) -> Integers:
    """Return twice the number of rows of the same group below each run of equal scores; a run's own rows count half.

    Args:
        counts_R: rows of each run. group_R: its group; runs of a group are adjacent.
        seen_G: rows of each group in earlier batches; updated in place.
    """
    first_R = _differs_from_last(group_R)
    before_R = np.cumsum(counts_R) - counts_R
    group_starts_R = np.maximum.accumulate(np.where(first_R, np.arange(len(first_R)), 0))
    twice_R: Integers = 2 * (seen_G[group_R] + before_R - before_R[group_starts_R]) + counts_R
    np.add.at(seen_G, group_R, counts_R)
    return twice_R


def _by_user(cells: _Cells) -> _Cells:
    """Merge the cells of one score into one per user."""
    users_C, place_C = np.unique(cells.users_C, return_inverse=True)
    positives_C, negatives_C = np.zeros(len(users_C), np.int64), np.zeros(len(users_C), np.int64)
    np.add.at(positives_C, place_C, cells.positives_C)
    np.add.at(negatives_C, place_C, cells.negatives_C)
    return _Cells(users_C, np.full(len(users_C), cells.scores_C[-1]), positives_C, negatives_C)


def _differs_from_last(values_N: NDArray[np.generic]) -> NDArray[np.bool_]:
    return np.concatenate([np.ones(min(len(values_N), 1), bool), values_N[1:] != values_N[:-1]])


class AucTally:
    """AUC: the probability that a positive row is scored above a negative one, ties counting half. Rows come by score.

    Pairs of rows cross users, so AUC is no sum over users, but to first order it is. With `w_u` the weight of user u,
    or how often a resample drew the user, AUC(w) = AUC + sum of `(w_u - 1) * influence_u` (Obuchowski, 1997, for
    clustered rows; DeLong et al., 1988, for one row per user). A user's influence is sum(V10 - AUC) / m over the user's
    positives, plus sum(V01 - AUC) / n over the user's negatives. V10 is the share of all n negatives below a row, V01
    the share of all m positives above it; ties count half.
    """

    def __init__(self, num_users: int) -> None:
        self._pairs = _Pairs(num_users, within_users=False)

    def add(self, rows: Rows) -> None:
        """Take the next rows."""
        self._pairs.add(rows)

    def measure(self) -> Measure:
        """Return AUC, None unless both labels occur; a user's part is AUC / U plus the user's influence."""
        pairs = self._pairs
        pairs.finish()
        positives, negatives = int(pairs.positives_U.sum()), int(pairs.negatives_U.sum())
        num_users = len(pairs.positives_U)
        if not positives or not negatives:
            return Measure(None, np.zeros(num_users))
        auc = int(pairs.below_positives_U.sum()) / (2 * positives * negatives)
        v10_U = pairs.below_positives_U / (2 * negatives)
        v01_U = pairs.negatives_U - pairs.below_negatives_U / (2 * positives)
        influence_U = (v10_U - auc * pairs.positives_U) / positives + (v01_U - auc * pairs.negatives_U) / negatives
        return Measure(auc, auc / num_users + influence_U)


class GaucTally:
    """GAUC: each user's AUC, averaged with the user's rows as weights (Zhu et al., 2017). Rows come by (user, score).

    Only users with both labels count: for the others AUC is not defined.
    """

    def __init__(self, num_users: int) -> None:
        self._pairs = _Pairs(num_users, within_users=True)

    def add(self, rows: Rows) -> None:
        """Take the next rows."""
        self._pairs.add(rows)

    def measure(self) -> Measure:
        """Return GAUC, None if no user has both labels; a user's part is AUC times rows."""
        pairs = self._pairs
        pairs.finish()
        both_U = (pairs.positives_U > 0) & (pairs.negatives_U > 0)
        positives_V, negatives_V = pairs.positives_U[both_U], pairs.negatives_U[both_U]
        rows_V = positives_V + negatives_V
        parts_U = np.zeros(len(both_U))
        parts_U[both_U] = pairs.below_positives_U[both_U] / (2 * positives_V * negatives_V) * rows_V
        rows = int(rows_V.sum())
        counts = {"users": len(rows_V), "rows": rows}
        return Measure(float(parts_U.sum()) / rows if rows else None, parts_U, counts)


class Decile(NamedTuple):
    """A tenth of the rows, by predicted probability.

    Attributes:
        rows: how many. predicted: their mean predicted probability. observed: the share of them with label 1.
    """

    rows: int
    predicted: float
    observed: float


class DecileTally:
    """Calibration in ten equal parts of the rows, lowest predictions first. Rows come by score.

    With fewer than ten rows each is a part; parts differ by at most one row.

    Args:
        num_rows: how many rows will come.
    """

    def __init__(self, num_rows: int) -> None:
        smallest, larger = divmod(num_rows, DECILES)
        self._rows_D = np.array([smallest + (part < larger) for part in range(DECILES)])
        self._ends_D = np.cumsum(self._rows_D)
        self._predicted_D = np.zeros(DECILES)
        self._positives_D = np.zeros(DECILES, np.int64)
        self._taken = 0

    def add(self, rows: Rows) -> None:
        """Take the next rows."""
        places_M = np.arange(self._taken, self._taken + len(rows.labels_M))
        part_M = np.searchsorted(self._ends_D, places_M, side="right")
        np.add.at(self._predicted_D, part_M, rows.scores_M)
        np.add.at(self._positives_D, part_M, rows.labels_M)
        self._taken += len(places_M)

    def deciles(self) -> tuple[Decile, ...]:
        """Return the parts that have rows, after the last row."""
        assert self._taken == self._ends_D[-1], "other rows came than were announced"
        parts = zip(self._rows_D.tolist(), self._predicted_D.tolist(), self._positives_D.tolist(), strict=True)
        return tuple(Decile(rows, predicted / rows, positives / rows) for rows, predicted, positives in parts if rows)


def return_on_investment(gains: Sequence[float], cost: float) -> float | None:
    """Return the SIDE paper's RoI (section 6.2): the mean NE gain of the tasks per unit of feature cost.

    For two tasks this is (gain of the first + gain of the second) / (2 C).

    Args:
        gains: the NE gain of each task.
        cost: the feature's cost C, proportional to its length. The result is None for 0 (no feature) or without gains.
    """
    return sum(gains) / (len(gains) * cost) if gains and cost > 0 else None
