"""Gains between arms, paired by user and by training, with intervals that hold both.

Rows of one user are correlated, so rows are not independent draws: an interval that resamples rows is far too narrow.
Whole users are resampled instead. A resample of users needs only each user's sums, so a thousand resamples are
one product of a count matrix with the sums. Every arm gets the same resamples, which makes the gain paired.

An arm trained again, from other seeds, has another gain. Replicates are therefore drawn in each resample too, but not
by picking among the few there are: R values picked with replacement understate the variance between trainings by
(R - 1) / R, and 2 to 5 values hardly show anything beyond their extremes. The mean over trainings is drawn from
Student's t with R - 1 degrees of freedom about the observed mean, which is exact if gains of trainings are normal.
`tests/ranker/test_intervals.py` simulates it. If trainings are almost the only variation, 95 % intervals of three
trainings cover the truth 95 times in 100. Picking replicates covers it 72 times, and 78 times with deviations scaled by
sqrt(R / (R - 1)). The effect of a training on single users is in both draws, which can only widen the interval.

Few trainings make long intervals: with two, an interval by their own deviation reaches 9 of their standard deviations
to each side. With fewer than `OWN_DEVIATION` trainings, the deviation is therefore pooled over all arms of the
comparison (`pooled_deviation`): the residual of an analysis of variance by arm and by training, with (A - 1)(R - 1)
degrees of freedom; with two arms it is the paired deviation. With four arms and two trainings, intervals are .3 times
as long. Arms are assumed to deviate equally: if one deviates twice as much as three others, its interval covers the
truth 91 to 93 times in 100 (the same simulation, three and two trainings).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from sidestack.ranker.metric_registry import Better

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

OWN_DEVIATION = 5
"""From this many trainings on, the deviation between trainings is estimated from the pair's own trainings."""

_CHUNK_COUNTS = 1 << 22  # 32 MiB of int64 counts at a time, whatever the number of users and resamples


def resample_users(sums_UC: Floats, num_resamples: int, seed: int) -> Floats:
    """Draw users with replacement, as many as there are, and add up the sums of those drawn.

    All columns get the same draws. Resamples are drawn a few at a time to bound memory, which does not change them.

    Args:
        sums_UC: each user's sums, such as the log loss under each arm.
        num_resamples: how many resamples, B.
        seed: equal seeds draw equal resamples.

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
    # Counts of uniform draws are multinomial, and far faster than a draw category by category.
    drawn_RU = rng.integers(0, num_users, size=(rows, num_users))
    drawn_RU += np.arange(rows)[:, None] * num_users
    counts = np.bincount(drawn_RU.ravel(), minlength=rows * num_users)
    return counts.reshape(rows, num_users).astype(np.float64)


@dataclass(frozen=True)
class Sums:
    """One arm's sums over rows, from which gains are computed.

    Attributes:
        trained_R: the sum in each replicate, over all users.
        drawn_B: the sum over each resample's users, over all replicates (see `resample_users`).
    """

    trained_R: Floats
    drawn_B: Floats


@dataclass(frozen=True)
class GainEstimate:
    """A gain with its interval and replicates.

    Attributes:
        gain: the gain of the mean over replicates.
        interval: lower and upper bound.
        replicates: the gain in each replicate.
    """

    gain: float
    interval: tuple[float, float]
    replicates: tuple[float, ...]

    def negated(self) -> "GainEstimate":
        """Return the estimate with every sign flipped."""
        low, high = self.interval
        return GainEstimate(-self.gain, (-high, -low), tuple(-gain for gain in self.replicates))

    @property
    def seeds(self) -> float | None:
        """The standard deviation over replicates; None with one replicate."""
        return _deviation(np.array(self.replicates)) if len(self.replicates) > 1 else None


@dataclass(frozen=True)
class TrainingDeviation:
    """The deviation between trainings of the logarithm of the ratio of two arms' sums.

    Attributes:
        deviation: the standard deviation; 0 with one training, from which it cannot be estimated.
        degrees: degrees of freedom.
    """

    deviation: float
    degrees: int


def pooled_deviation(sums_AR: Floats) -> TrainingDeviation:
    """Return the deviation of a pair of arms, from the sums of A arms in R replicates; 0 if a sum is not positive.

    Arms of one replicate have the same seeds, and an effect of the seeds on all arms cancels in a gain. The means of
    arms and of replicates are subtracted from the logarithms; the residual is random.
    """
    arms, replicates = sums_AR.shape
    degrees = (arms - 1) * (replicates - 1)
    if not degrees or not (sums_AR > 0).all():
        return TrainingDeviation(0.0, 0)
    logs_AR = np.log(sums_AR)
    left_AR = logs_AR - logs_AR.mean(axis=1, keepdims=True) - logs_AR.mean(axis=0) + logs_AR.mean()
    return TrainingDeviation(float(np.sqrt(2.0 * np.square(left_AR).sum() / degrees)), degrees)


def training_draws(num_resamples: int, num_replicates: int, degrees: int, seed: int) -> Floats:
    """Draw how far the mean over replicates may lie from the truth, in standard deviations of one replicate.

    The draws are the midpoints of B parts of equal probability, in random order, so their quantiles are those of the
    distribution. Independent draws would not do: with one degree of freedom, the 2.5 % quantile of 1,000 draws has a
    standard deviation of a fifth of itself, and a fixed seed repeats the same error in every comparison.

    Returns:
        [B], Student's t over sqrt(R). Zeros without a degree of freedom: the interval is then only over users.
    """
    if not degrees:
        return np.zeros(num_resamples)
    shares_B = (np.arange(num_resamples) + 0.5) / num_resamples
    draws_B: Floats = stdtrit(degrees, shares_B) / np.sqrt(num_replicates)
    rng = np.random.default_rng([seed, num_replicates])  # independent of the users' draws
    return rng.permutation(draws_B)


def student_reach(confidence: float, num_replicates: int, degrees: int) -> float:
    """Return the half-width of the interval of a mean over replicates, in standard deviations of one replicate."""
    return float(stdtrit(degrees, (1.0 + confidence) / 2.0) / np.sqrt(num_replicates))


def estimate_gain(
    arm: Sums, reference: Sums, better: Better, training: TrainingDeviation, seed: int, confidence: float
) -> GainEstimate | None:
    """Return the gain of an arm over a reference, paired by replicate and user, with its percentile interval.

    The gain is 1 - arm / reference where lower is better, arm / reference - 1 where higher is.

    Args:
        arm, reference: sums on the same rows, with the same resamples, replicate by replicate.
        better: whether lower or higher sums are better.
        training: from `pooled_deviation`. seed: seeds the draws of trainings.
        confidence: the share of resamples inside the interval, such as 0.95.

    Returns:
        None if the reference's sum is not above 0 in some replicate or resample.
    """
    if not ((reference.trained_R > 0).all() and (reference.drawn_B > 0).all()):
        return None
    gains_R = 1.0 - arm.trained_R / reference.trained_R
    ratio = arm.trained_R.sum() / reference.trained_R.sum()
    draws_B = training_draws(len(arm.drawn_B), len(gains_R), training.degrees, seed)
    gains_B = 1.0 - arm.drawn_B / reference.drawn_B + ratio * training.deviation * draws_B
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(gains_B, [tail, 1.0 - tail], method="hazen")  # treats draws as such midpoints too
    lowered = GainEstimate(float(1.0 - ratio), (float(low), float(high)), tuple(gains_R.tolist()))
    return lowered if better == "lower" else lowered.negated()


def _deviation(values_R: Floats) -> float:
    return float(values_R.std(ddof=1))
