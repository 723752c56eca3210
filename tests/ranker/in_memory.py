"""Metrics over arrays of all rows at once: the readable reference for the tallies of `ranker.statistics`."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidestack.ranker.statistics import DECILES, Decile, log_loss

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class TaskMetrics:
    """How well one arm predicts one task.

    Attributes:
        num: labelled rows.
        positives: rows with label 1.
        ne: normalized entropy (SIDE paper, Eq. 7): mean log loss over the entropy of the base rate; below 1 is
            better than always predicting the base rate. None without both a positive and a negative row.
        auc: the chance that a positive row is scored above a negative one, ties counting half. None as for `ne`.
        calibration: sum of predicted probabilities over number of positives; 1 is right. None without positives.
    """

    num: int
    positives: int
    ne: float | None
    auc: float | None
    calibration: float | None


def task_metrics(labels_N: NDArray[np.generic], probabilities_N: NDArray[np.floating]) -> TaskMetrics:
    """Measure one arm on one task.

    Args:
        labels_N: 0 or 1, no missing label.
        probabilities_N: the predicted chance of label 1.
    """
    positives_N = labels_N.astype(bool)
    num, positives = len(positives_N), int(positives_N.sum())
    decided = 0 < positives < num
    predicted = float(probabilities_N.sum(dtype=np.float64))
    return TaskMetrics(
        num=num,
        positives=positives,
        ne=_normalized_entropy(positives_N, probabilities_N) if decided else None,
        auc=_area_under_curve(positives_N, probabilities_N) if decided else None,
        calibration=predicted / positives if positives else None,
    )


def _normalized_entropy(positives_N: NDArray[np.bool_], probabilities_N: NDArray[np.floating]) -> float:
    rate = positives_N.mean(dtype=np.float64)
    entropy = -(rate * np.log(rate) + (1.0 - rate) * np.log1p(-rate))
    return float(log_loss(positives_N, probabilities_N).mean() / entropy)


def _area_under_curve(positives_N: NDArray[np.bool_], probabilities_N: NDArray[np.floating]) -> float:
    return float(_placements(positives_N, probabilities_N)[positives_N].mean())


def _placements(positives_N: NDArray[np.bool_], probabilities_N: NDArray[np.floating]) -> Floats:
    """Return the chance that a row is ordered correctly against one of the other label; ties count half."""
    _, group_N, size_G = np.unique(probabilities_N, return_inverse=True, return_counts=True)
    positives_G = np.bincount(group_N[positives_N], minlength=len(size_G))
    negatives_G = size_G - positives_G
    below_G = (np.cumsum(negatives_G) - negatives_G / 2.0) / negatives_G.sum()
    above_G = 1.0 - (np.cumsum(positives_G) - positives_G / 2.0) / positives_G.sum()
    placements_N: Floats = np.where(positives_N, below_G[group_N], above_G[group_N])
    return placements_N


def auc_influence(users_N: Integers, labels_N: NDArray[np.generic], probabilities_N: NDArray[np.floating]) -> Floats:
    """Return the derivative of AUC by each user's weight, where all users have weight 1.

    Pairs of rows cross users, so AUC is not a sum over users, but its first-order expansion is: with `w_u` the weight
    of user u, or how often a resample drew the user, AUC(w) = AUC + sum of `(w_u - 1) * influence_u` (Obuchowski,
    1997, for clustered rows; with one row per user DeLong et al., 1988).

    Args:
        users_N: the user of each row, 0 to U - 1, each with a row; any order.
        labels_N: 0 or 1, both must occur.
        probabilities_N: the predicted chance of label 1.

    Returns:
        [U]; they add up to 0. A user's is sum(V10 - AUC) / m over the user's positives, V10 a row's share of all n
        negatives below it, plus sum(V01 - AUC) / n over the user's negatives, V01 a row's share of all m positives
        above it; ties count half.
    """
    positives_N = labels_N.astype(bool)
    positives = int(positives_N.sum())
    assert 0 < positives < len(positives_N), "AUC is not defined"
    right_N = _placements(positives_N, probabilities_N)
    share_N = np.where(positives_N, 1.0 / positives, 1.0 / (len(positives_N) - positives))
    influence_N = (right_N - right_N[positives_N].mean()) * share_N
    return np.bincount(users_N, weights=influence_N).astype(np.float64)


class UserAuc(NamedTuple):
    """AUC within each user who has both labels; it is undefined for other users, who do not count.

    Attributes:
        users_V: those users, ascending.
        auc_V: the chance that a user's positive row is scored above the same user's negative row.
        rows_V: the number of rows of each: the weights.
    """

    users_V: Integers
    auc_V: Floats
    rows_V: Integers

    @property
    def gauc(self) -> float | None:
        """GAUC: the users' AUC averaged with their rows as weights (Zhu et al., 2017); None without such users."""
        return float(self.auc_V @ self.rows_V / self.rows_V.sum()) if len(self.users_V) else None


def auc_by_user(users_N: Integers, labels_N: NDArray[np.generic], probabilities_N: NDArray[np.floating]) -> UserAuc:
    """Measure how well rows are ordered within each user; ties count half.

    Args:
        users_N: the user of each row, any order.
        labels_N: 0 or 1, no missing label.
        probabilities_N: the predicted chance of label 1.
    """
    order_N = np.lexsort((probabilities_N, users_N))
    users_N, scores_N, positives_N = users_N[order_N], probabilities_N[order_N], labels_N[order_N].astype(bool)
    first_N = _differs_from_last(users_N)
    user_N = np.cumsum(first_N) - 1
    # Equal scores of one user share the mean of their ranks, counted from the user's first row.
    tie_N = np.cumsum(first_N | _differs_from_last(scores_N)) - 1
    size_T = np.bincount(tie_N)
    rank_N = (np.cumsum(size_T) - (size_T - 1) / 2.0)[tie_N] - np.flatnonzero(first_N)[user_N]
    rows_U = np.bincount(user_N)
    positives_U = np.bincount(user_N[positives_N], minlength=len(rows_U))
    ranks_U = np.bincount(user_N[positives_N], weights=rank_N[positives_N], minlength=len(rows_U))
    both_U = (positives_U > 0) & (positives_U < rows_U)
    p_V, rows_V = positives_U[both_U], rows_U[both_U]
    auc_V = (ranks_U[both_U] - p_V * (p_V + 1) / 2.0) / (p_V * (rows_V - p_V))
    return UserAuc(users_N[first_N][both_U], auc_V, rows_V)


def _differs_from_last(values_N: NDArray[np.generic]) -> NDArray[np.bool_]:
    return np.concatenate([np.ones(min(len(values_N), 1), bool), values_N[1:] != values_N[:-1]])


def calibration_deciles(labels_N: NDArray[np.generic], probabilities_N: NDArray[np.floating]) -> tuple[Decile, ...]:
    """Compare prediction with outcome in ten equal parts of the rows, lowest predictions first.

    Fewer than ten rows give one part each; parts differ by at most one row.

    Args:
        labels_N: 0 or 1, no missing label.
        probabilities_N: the predicted chance of label 1.
    """
    parts = np.array_split(np.argsort(probabilities_N, kind="stable"), DECILES)
    return tuple(
        Decile(
            rows=len(part),
            predicted=float(probabilities_N[part].mean(dtype=np.float64)),
            observed=float(labels_N[part].mean(dtype=np.float64)),
        )
        for part in parts
        if len(part)
    )
