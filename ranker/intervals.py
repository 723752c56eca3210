"""Gains between arms, paired by user and by training, with intervals that hold both.

Rows of one user are alike, so rows are not independent draws: an interval that resamples rows is far too narrow.
Whole users are resampled instead. A resample of users needs only each user's sums, so a thousand resamples are
one product of a count matrix with the sums; every arm meets the same resamples, which makes the gain paired.

An arm that is trained again, from other seeds, gives another gain. Replicates are therefore drawn in each resample,
too, but not by picking among the few there are: R values picked with replacement understate the variance between
trainings by (R - 1) / R, and 2 to 5 values hardly show anything beyond their extremes. The mean over trainings is
drawn from Student's t with R - 1 degrees of freedom about the one found, which is exact where gains of trainings are
normal. `tests/ranker/test_intervals.py` simulates it: where hardly anything but trainings differs, 95 % intervals of
three trainings hold the truth 95 times in 100; picking replicates holds it 72 times, and 78 times with deviations
scaled by sqrt(R / (R - 1)). What a training moves in single users is in both draws, which can only widen the interval.
The price of few trainings is its length: of two it reaches 9 of their standard deviations to each side, of three 2.5.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from ranker.metric_registry import Better

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_CHUNK_COUNTS = 1 << 22  # 32 MiB of int64 counts at a time, whatever the number of users and resamples


def resample_users(sums_UC: Floats, num_resamples: int, seed: int) -> Floats:
    """Draw users with replacement, as many as there are, and add up the sums of those drawn.

    All columns meet the same draws. Memory stays bounded by drawing a few resamples at a time, which does not change
    them.

    Args:
        sums_UC: each user's sums, such as the log loss under each arm.
        num_resamples: how many resamples, B.
        seed: the same seed gives the same resamples.

    Returns:
        The sums of each resample, [B, C].
    """
    num_users, num_columns = sums_UC.shape
    sums_BC = np.zeros((num_resamples, num_columns))
    if num_users == 0:
        return sums_BC
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_COUNTS // num_users)
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        sums_BC[start : start + rows] = _draw_counts(rng, rows, num_users) @ sums_UC
    return sums_BC


def _draw_counts(rng: np.random.Generator, rows: int, num_users: int) -> Floats:
    # Counting uniform draws gives the multinomial, far faster than drawing it category by category.
    drawn_RU = rng.integers(0, num_users, size=(rows, num_users))
    drawn_RU += np.arange(rows)[:, None] * num_users
    counts = np.bincount(drawn_RU.ravel(), minlength=rows * num_users)
    return counts.reshape(rows, num_users).astype(np.float64)


@dataclass(frozen=True)
class Sums:
    """One arm's sums over rows, all that a gain is made from.

    Attributes:
        trained_R: the sum in each replicate, over all users.
        drawn_B: the sum over each resample's users, over all replicates (see `resample_users`).
    """

    trained_R: Floats
    drawn_B: Floats


@dataclass(frozen=True)
class GainEstimate:
    """A gain and what is known of it.

    Attributes:
        gain: of the mean over replicates.
        interval: lower and upper bound.
        replicates: the gain in each replicate.
    """

    gain: float
    interval: tuple[float, float]
    replicates: tuple[float, ...]

    def turned(self) -> "GainEstimate":
        """Return the same with every sign turned."""
        low, high = self.interval
        return GainEstimate(-self.gain, (-high, -low), tuple(-gain for gain in self.replicates))

    @property
    def seeds(self) -> float | None:
        """The standard deviation over replicates; None with one."""
        return _deviation(np.array(self.replicates)) if len(self.replicates) > 1 else None


def training_draws(num_resamples: int, num_replicates: int, seed: int) -> Floats:
    """Draw how far the mean over replicates may lie from the truth, in standard deviations of one replicate.

    Returns:
        [B], Student's t with R - 1 degrees of freedom over sqrt(R). Zeros with one replicate, which says nothing of
        training: the interval is then over users alone.
    """
    if num_replicates == 1:
        return np.zeros(num_resamples)
    # One draw of each of B equally likely strata. Draws at random would leave the ends of an interval to chance where
    # the tails are heavy: of two trainings, 1,000 of them move the 2.5 % quantile by a fifth of itself.
    shares_B = (np.arange(num_resamples) + 0.5) / num_resamples
    draws_B: Floats = stdtrit(num_replicates - 1, shares_B) / np.sqrt(num_replicates)
    rng = np.random.default_rng([seed, num_replicates])  # apart from the users' draws
    return rng.permutation(draws_B)


def student_reach(confidence: float, num_replicates: int) -> float:
    """Return how far the interval of a mean over replicates reaches, in standard deviations of one replicate."""
    return float(stdtrit(num_replicates - 1, (1.0 + confidence) / 2.0) / np.sqrt(num_replicates))


def estimate_gain(
    arm: Sums, reference: Sums, better: Better, training_B: Floats, confidence: float
) -> GainEstimate | None:
    """Return the gain of an arm over a reference, paired by replicate and user, with its percentile interval.

    The gain is 1 - arm / reference where lower is better, arm / reference - 1 where higher is.

    Args:
        arm, reference: sums on the same rows, with the same resamples, replicate by replicate.
        better: whether lower or higher sums are better.
        training_B: of `training_draws`.
        confidence: the share of resamples inside the interval, such as 0.95.

    Returns:
        None when the reference's sum is not above 0, in some replicate or resample.
    """
    if not ((reference.trained_R > 0).all() and (reference.drawn_B > 0).all()):
        return None
    gains_R = 1.0 - arm.trained_R / reference.trained_R
    gains_B = 1.0 - arm.drawn_B / reference.drawn_B
    if len(gains_R) > 1:
        gains_B = gains_B + _deviation(gains_R) * training_B
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(gains_B, [tail, 1.0 - tail])
    gain = 1.0 - arm.trained_R.sum() / reference.trained_R.sum()
    lowered = GainEstimate(float(gain), (float(low), float(high)), tuple(gains_R.tolist()))
    return lowered if better == "lower" else lowered.turned()


def _deviation(values_R: Floats) -> float:
    return float(values_R.std(ddof=1))
