"""The statistics that compare arms: exact metrics of one arm, and paired intervals for the gain between two.

Rows of one user are alike, so rows are not independent draws: an interval that resamples rows is far too narrow.
Whole users are resampled instead. A resample of users needs only each user's sums, so a thousand resamples are
one product of a count matrix with the sums; every arm meets the same resamples, which makes the gain paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

EPSILON = 1e-12
"""Probabilities are kept this far from 0 and 1, as in torchrec's normalized entropy."""

_CHUNK_COUNTS = 1 << 22  # 32 MiB of int64 counts at a time, whatever the number of users and resamples


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


def log_loss(labels_N: NDArray[np.generic], probabilities_N: NDArray[np.floating]) -> Floats:
    """Give each row's log loss in nats, probabilities kept `EPSILON` away from 0 and 1.

    Args:
        labels_N: 0 or 1.
        probabilities_N: the predicted chance of label 1.
    """
    p_N = np.clip(probabilities_N.astype(np.float64), EPSILON, 1.0 - EPSILON)
    return -np.where(labels_N.astype(bool), np.log(p_N), np.log1p(-p_N))


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
    # Mann-Whitney: the positives' rank sum; equal scores share the mean of their ranks.
    _, group_N, size_G = np.unique(probabilities_N, return_inverse=True, return_counts=True)
    mean_rank_G = np.cumsum(size_G) - (size_G - 1) / 2.0
    positives = int(positives_N.sum())
    negatives = len(positives_N) - positives
    above = mean_rank_G[group_N[positives_N]].sum() - positives * (positives + 1) / 2.0
    return float(above / positives / negatives)


def sum_by_user(users_N: Integers, losses_N: Floats) -> tuple[Integers, Floats]:
    """Add up the log loss of each user's rows, all that a resample of users needs to know.

    Args:
        users_N: the user of each row, any order.
        losses_N: the log loss of each row.

    Returns:
        The distinct users [U], ascending, and the sum of their losses [U].
    """
    users_U, position_N = np.unique(users_N, return_inverse=True)
    # Without rows, bincount forgets its weights' type.
    return users_U, np.bincount(position_N, weights=losses_N, minlength=len(users_U)).astype(np.float64)


def resample_users(losses_UA: Floats, num_resamples: int, seed: int) -> Floats:
    """Draw users with replacement, as many as there are, and add up the losses of those drawn.

    All arms meet the same draws. Memory stays bounded by drawing a few resamples at a time, which does not change
    them.

    Args:
        losses_UA: each user's summed log loss under each arm.
        num_resamples: how many resamples, B.
        seed: the same seed gives the same resamples.

    Returns:
        The summed loss of each resample under each arm, [B, A].
    """
    num_users, num_arms = losses_UA.shape
    sums_BA = np.zeros((num_resamples, num_arms))
    if num_users == 0:
        return sums_BA
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_COUNTS // num_users)
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        sums_BA[start : start + rows] = _draw_counts(rng, rows, num_users) @ losses_UA
    return sums_BA


def _draw_counts(rng: np.random.Generator, rows: int, num_users: int) -> Floats:
    # Counting uniform draws gives the multinomial, far faster than drawing it category by category.
    drawn_RU = rng.integers(0, num_users, size=(rows, num_users))
    drawn_RU += np.arange(rows)[:, None] * num_users
    counts = np.bincount(drawn_RU.ravel(), minlength=rows * num_users)
    return counts.reshape(rows, num_users).astype(np.float64)


def gain(loss: float, reference_loss: float) -> float | None:
    """Give the NE gain 1 - NE(arm) / NE(reference), from losses (or NEs) on the same rows.

    On the same rows both NEs have the same denominator (Eq. 7), so the ratio of NEs is the ratio of losses.
    None when the reference has no loss to improve on.
    """
    return 1.0 - loss / reference_loss if reference_loss > 0 else None


def gain_interval(sums_B: Floats, reference_sums_B: Floats, confidence: float) -> tuple[float, float] | None:
    """Give the percentile interval of the paired NE gain.

    Args:
        sums_B: the arm's summed loss in each resample, of `resample_users`.
        reference_sums_B: the reference's, in the same resamples.
        confidence: the share of resamples inside, such as 0.95.

    Returns:
        The lower and upper bound; None when some resample of the reference has no loss.
    """
    if not (reference_sums_B > 0).all():
        return None
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(1.0 - sums_B / reference_sums_B, [tail, 1.0 - tail])
    return float(low), float(high)


def return_on_investment(gains: Sequence[float], cost: float) -> float | None:
    """Give the SIDE paper's RoI (section 6.2): the mean NE gain of the tasks for one unit of feature cost.

    For two tasks this is (gain_click + gain_conversion) / (2 C).

    Args:
        gains: the NE gain of each task.
        cost: the feature's cost C, proportional to its length. 0 (no feature) gives None, as no gains do.
    """
    return sum(gains) / (len(gains) * cost) if gains and cost > 0 else None
