"""Gains and their intervals: paired, over users and trainings, with the coverage that they claim."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import t as student

from sidestack.ranker import intervals
from sidestack.ranker.intervals import (
    GainEstimate,
    Sums,
    estimate_gain,
    pooled_deviation,
    resample_users,
    student_reach,
    training_draws,
)
from sidestack.ranker.metric_registry import Better

Floats = NDArray[np.float64]


def slow_resamples(sums_UC: Floats, num_resamples: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(sums_UC), len(sums_UC)) for _ in range(num_resamples)]
    return np.array([sums_UC[drawn].sum(axis=0) for drawn in draws])


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32), st.integers(1, 100))
def test_resamples_equal_drawing_users_one_resample_at_a_time(users: int, columns: int, seed: int, chunk: int) -> None:
    sums_UC = np.random.default_rng(seed).random((users, columns))
    before = intervals._CHUNK_COUNTS
    intervals._CHUNK_COUNTS = chunk
    try:
        found_BC = resample_users(sums_UC, 11, seed)
    finally:
        intervals._CHUNK_COUNTS = before
    np.testing.assert_allclose(found_BC, slow_resamples(sums_UC, 11, seed), rtol=1e-12)


def estimate(
    arm_UR: Floats,
    reference_UR: Floats,
    seed: int = 0,
    confidence: float = 0.95,
    better: Better = "lower",
    others_AUR: tuple[Floats, ...] = (),
) -> GainEstimate | None:
    """Return the gain between two arms from each user's loss in each replicate; other arms add to the deviation."""
    both_UC = np.stack([arm_UR.sum(axis=1), reference_UR.sum(axis=1)], axis=1)
    arm_B, reference_B = resample_users(both_UC, 400, seed).T
    arm, reference = Sums(arm_UR.sum(axis=0), arm_B), Sums(reference_UR.sum(axis=0), reference_B)
    training = pooled_deviation(np.stack([losses_UR.sum(axis=0) for losses_UR in (arm_UR, reference_UR, *others_AUR)]))
    return estimate_gain(arm, reference, better, training, seed, confidence)


def test_gain_is_the_relative_increase_when_higher_is_better() -> None:
    rng = np.random.default_rng(2)
    reference_UR = rng.random((50, 3)) + 1
    arm_UR = reference_UR * rng.normal(1.02, 0.05, (50, 3))
    lost, raised = estimate(arm_UR, reference_UR), estimate(arm_UR, reference_UR, better="higher")
    assert lost is not None and raised is not None
    assert raised.gain == pytest.approx(arm_UR.sum() / reference_UR.sum() - 1) and raised.gain > 0
    assert raised.interval == (-lost.interval[1], -lost.interval[0])
    assert raised.replicates == pytest.approx(arm_UR.sum(axis=0) / reference_UR.sum(axis=0) - 1)
    assert raised.seeds == pytest.approx(lost.seeds)


def test_resampling_takes_bounded_memory_however_many_resamples() -> None:
    sums_UC = np.ones((1_500_000, 2))
    resample_users(sums_UC, 2, seed=0)
    peaks = []
    for resamples in (4, 12):
        tracemalloc.start()
        assert resample_users(sums_UC, resamples, seed=0).tolist() == [[1_500_000.0] * 2] * resamples
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The bound holds draws, their counts, and these as floats, for the users of two resamples at a time.
    assert peaks[1] < 1.05 * peaks[0] < 1.05 * 4 * 8 * max(intervals._CHUNK_COUNTS, len(sums_UC))


def test_resampling_no_users_gives_no_gain() -> None:
    assert resample_users(np.empty((0, 2)), 5, seed=0).tolist() == [[0.0, 0.0]] * 5
    assert estimate(np.empty((0, 2)), np.empty((0, 2))) is None


def test_arm_has_no_gain_over_itself() -> None:
    losses_UR = np.random.default_rng(2).random((50, 3))
    assert estimate(losses_UR, losses_UR) == GainEstimate(0.0, (0.0, 0.0), (0.0, 0.0, 0.0))
    assert estimate(losses_UR, np.zeros((50, 3))) is None


def test_gain_is_of_the_mean_loss_and_paired_by_replicate() -> None:
    reference_UR = np.array([[1.0, 2.0], [3.0, 6.0]])
    found = estimate(reference_UR * [0.9, 0.7], reference_UR)
    assert found is not None
    assert found.gain == pytest.approx(1 - (0.9 * 4 + 0.7 * 8) / 12)
    assert found.replicates == pytest.approx((0.1, 0.3))
    assert found.seeds == pytest.approx(np.sqrt(2 * 0.1**2))


@pytest.mark.parametrize(("replicates", "t"), [(2, 12.706), (3, 4.303), (8, 2.365)])  # t from a printed table
def test_interval_is_that_of_students_t_when_users_are_identical(replicates: int, t: float) -> None:
    reach = student_reach(0.95, replicates, replicates - 1)
    assert reach == pytest.approx(t / np.sqrt(replicates), rel=1e-3)
    gains_R = np.linspace(0.01, 0.02, replicates)
    arm_UR, reference_UR = np.tile(1 - gains_R, (30, 1)), np.ones((30, replicates))
    for seed in range(5):
        found = estimate(arm_UR, reference_UR, seed=seed)
        assert found is not None and found.seeds is not None
        low, high = found.interval
        assert high - found.gain == pytest.approx(reach * found.seeds, rel=0.07)  # approximate: 400 strata, logarithms
        assert found.gain - low == pytest.approx(high - found.gain)


def test_interval_of_one_replicate_is_a_bootstrap_over_users() -> None:
    rng = np.random.default_rng(6)
    reference_U = rng.random(40)
    arm_U = reference_U * rng.normal(0.97, 0.1, 40)
    gains_B = 1 - np.divide(*slow_resamples(np.stack([arm_U, reference_U], axis=1), 400, 0).T)
    found = estimate(arm_U[:, None], reference_U[:, None])
    assert found is not None and found.seeds is None
    assert found.interval == pytest.approx(np.quantile(gains_B, [0.025, 0.975], method="hazen"))


def test_pairing_removes_variation_that_both_arms_share() -> None:
    rng = np.random.default_rng(3)
    shared_UR = rng.gamma(0.5, 10.0, (300, 1)) * rng.normal(1.0, 0.1, (1, 4))
    arm_UR = 0.97 * shared_UR + rng.normal(0, 0.05, (300, 4))
    paired, unpaired = estimate(arm_UR, shared_UR), estimate(np.roll(arm_UR, (1, 1), (0, 1)), shared_UR)
    assert paired is not None and unpaired is not None
    assert paired.interval[0] > 0 > unpaired.interval[0]
    assert paired.interval[1] - paired.interval[0] < 0.1 * (unpaired.interval[1] - unpaired.interval[0])


@pytest.mark.parametrize("replicates", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_draws_of_trainings_have_the_quantiles_of_students_t(replicates: int, seed: int) -> None:
    tails = [0.005, 0.025, 0.5, 0.975, 0.995]
    draws_B = training_draws(1000, replicates, replicates - 1, seed)
    expected = student.ppf(tails, replicates - 1) / np.sqrt(replicates)
    found = np.quantile(draws_B, tails, method="hazen")
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-12)
    assert abs(np.corrcoef(draws_B[1:], draws_B[:-1])[0, 1]) < 0.2  # not in an order that users' draws could share


def test_interval_over_trainings_is_that_of_students_t_on_both_sides() -> None:
    reference_UR = np.ones((50, 2))
    found = estimate(reference_UR * [0.98, 0.96], reference_UR)
    assert found is not None and found.seeds is not None
    half = student.ppf(0.975, 1) * found.seeds / np.sqrt(2)
    assert found.interval == pytest.approx((0.03 - half, 0.03 + half), rel=5e-3)


TRUE_GAIN, USERS = 0.01, 100


def draw_losses(
    rng: np.random.Generator, replicates: int, by_user: float, by_training: float, by_both: float
) -> tuple[Floats, Floats]:
    """Draw both arms' losses [U, R] whose gain deviates by user, by training, and by user within a training."""
    reference_UR = np.repeat(rng.gamma(2.0, 3.0, (USERS, 1)), replicates, axis=1)
    deviation_UR = by_user * rng.normal(size=(USERS, 1)) + by_training * rng.normal(size=(1, replicates))
    deviation_UR = deviation_UR + by_both * rng.normal(size=(USERS, replicates))
    return reference_UR * (1 - TRUE_GAIN - deviation_UR), reference_UR


def picked(arm_UR: Floats, reference_UR: Floats, seed: int, scale: float) -> tuple[float, float]:
    """Return the interval of resampling both users and replicates, with the deviations of replicates scaled."""
    users, replicates = reference_UR.shape
    rng = np.random.default_rng(seed)
    of_users_BU = rng.multinomial(users, np.full(users, 1 / users), 400)
    of_replicates_BR = rng.multinomial(replicates, np.full(replicates, 1 / replicates), 400)
    sums_B = []
    for losses_UR in (arm_UR, reference_UR):
        mean_U1 = losses_UR.mean(axis=1, keepdims=True)
        scaled_UR = mean_U1 + scale * (losses_UR - mean_U1)
        sums_B.append(((of_users_BU @ scaled_UR) * of_replicates_BR).sum(axis=1))
    low, high = np.quantile(1 - sums_B[0] / sums_B[1], [0.025, 0.975])
    return float(low), float(high)


def coverage(replicates: int, by_user: float, by_training: float, by_both: float = 0.0) -> dict[str, float]:
    """Return how often the interval contains the truth: ours, that of resampled replicates, and of scaled ones."""
    rng = np.random.default_rng([replicates, 4])
    held = {"ours": 0, "picked": 0, "scaled": 0}
    trials = 400
    unbiased = np.sqrt(replicates / max(replicates - 1, 1))
    for trial in range(trials):
        losses = draw_losses(rng, replicates, by_user, by_training, by_both)
        found = estimate(*losses, seed=trial)
        assert found is not None
        bounds = {
            "ours": found.interval,
            "picked": picked(*losses, trial, 1.0),
            "scaled": picked(*losses, trial, unbiased),
        }
        for way, (low, high) in bounds.items():
            held[way] += low <= TRUE_GAIN <= high
    return {way: number / trials for way, number in held.items()}


# The standard error of a share of 0.95 in 400 trials is 0.011.


@pytest.mark.parametrize("replicates", [2, 3, 4, 5])
def test_intervals_cover_the_truth_when_only_trainings_differ(replicates: int) -> None:
    found = coverage(replicates, by_user=0.002, by_training=0.003)
    assert 0.92 <= found["ours"] <= 0.98
    # Intervals of few resampled replicates are too narrow, even with their variance corrected.
    assert found["picked"] < 0.88 and found["picked"] < found["scaled"] < 0.91


def test_intervals_cover_the_truth_when_users_differ_too() -> None:
    ours = coverage(3, by_user=0.03, by_training=0.002)["ours"]
    assert 0.92 <= ours <= 0.99


def test_intervals_are_not_too_narrow_when_trainings_affect_single_users() -> None:
    ours = coverage(4, by_user=0.01, by_training=0.002, by_both=0.05)["ours"]
    assert ours >= 0.93


def test_intervals_of_one_training_cover_the_truth_when_only_users_differ() -> None:
    ours = coverage(1, by_user=0.1, by_training=0.0)["ours"]
    assert 0.91 <= ours <= 0.98  # percentile intervals are known to be slightly narrow


def pooled_coverage(replicates: int, by_training_A: list[float]) -> tuple[float, float]:
    """Return how often the interval of the second arm's gain over the first contains the truth, and its mean width.

    Arms differ only by trainings, each with its own deviation; the seeds of a training affect all arms alike.
    """
    rng, held, widths, trials = np.random.default_rng([replicates, 9]), 0, [], 500
    for trial in range(trials):
        shared_R = rng.normal(1.0, 0.01, replicates)
        arms = [
            shared_R * (1 - TRUE_GAIN * (at == 1) + rng.normal(0, deviation, replicates))
            for at, deviation in enumerate(by_training_A)
        ]
        reference_UR, arm_UR, *others = (np.tile(arm_R, (5, 1)) for arm_R in arms)
        found = estimate(arm_UR, reference_UR, seed=trial, others_AUR=tuple(others))
        assert found is not None
        held += found.interval[0] <= TRUE_GAIN <= found.interval[1]
        widths.append(found.interval[1] - found.interval[0])
    return held / trials, float(np.mean(widths))


@pytest.mark.parametrize("replicates", [2, 3])
def test_pooled_intervals_cover_the_truth_and_are_short(replicates: int) -> None:
    alone, width_alone = pooled_coverage(replicates, [0.003] * 2)
    pooled, width = pooled_coverage(replicates, [0.003] * 4)
    assert 0.92 <= alone <= 0.98 and 0.92 <= pooled <= 0.98
    assert width < (0.4 if replicates == 2 else 0.8) * width_alone


def test_arm_with_twice_the_deviation_of_others_is_covered_less() -> None:
    held, _ = pooled_coverage(2, [0.003, 0.006, 0.003, 0.003])
    assert 0.88 <= held <= 0.95  # as documented in `ranker.intervals`


def test_pooled_deviation_excludes_effects_common_to_all_arms() -> None:
    rng = np.random.default_rng(1)
    sums_AR = rng.uniform(1, 2, (4, 1)) * rng.uniform(1, 2, (1, 3))
    assert pooled_deviation(sums_AR).deviation == pytest.approx(0, abs=1e-12)
    assert pooled_deviation(sums_AR).degrees == 6
    two_AR = rng.uniform(1, 1.01, (2, 5))
    of_pair = np.log(two_AR[0] / two_AR[1]).std(ddof=1)
    assert pooled_deviation(two_AR).deviation == pytest.approx(of_pair)
    assert pooled_deviation(two_AR[:, :1]).degrees == 0
