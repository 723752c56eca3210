"""Gains and their intervals: paired, over users and trainings, and covering the truth as often as they say."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ranker import intervals
from ranker.intervals import GainEstimate, Sums, estimate_gain, resample_users, student_reach, training_draws
from ranker.metric_registry import Better

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
    arm_UR: Floats, reference_UR: Floats, seed: int = 0, confidence: float = 0.95, better: Better = "lower"
) -> GainEstimate | None:
    """Return the gain between two arms from each user's loss in each replicate."""
    both_UC = np.stack([arm_UR.sum(axis=1), reference_UR.sum(axis=1)], axis=1)
    arm_B, reference_B = resample_users(both_UC, 400, seed).T
    training_B = training_draws(400, arm_UR.shape[1], seed)
    arm, reference = Sums(arm_UR.sum(axis=0), arm_B), Sums(reference_UR.sum(axis=0), reference_B)
    return estimate_gain(arm, reference, better, training_B, confidence)


def test_where_higher_is_better_the_gain_is_what_the_arm_has_more() -> None:
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
    # Draws, their counts, and these as floats, of the users of two resamples at a time.
    assert peaks[1] < 1.05 * peaks[0] < 1.05 * 4 * 8 * max(intervals._CHUNK_COUNTS, len(sums_UC))


def test_resampling_no_users_gives_no_gain() -> None:
    assert resample_users(np.empty((0, 2)), 5, seed=0).tolist() == [[0.0, 0.0]] * 5
    assert estimate(np.empty((0, 2)), np.empty((0, 2))) is None


def test_an_arm_gains_nothing_over_itself() -> None:
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


@pytest.mark.parametrize(("replicates", "t"), [(2, 12.706), (3, 4.303), (8, 2.365)])  # t: of a printed table
def test_where_users_are_alike_the_interval_is_that_of_students_t(replicates: int, t: float) -> None:
    reach = student_reach(0.95, replicates)
    assert reach == pytest.approx(t / np.sqrt(replicates), rel=1e-3)
    gains_R = np.linspace(0.01, 0.02, replicates)
    arm_UR, reference_UR = np.tile(1 - gains_R, (30, 1)), np.ones((30, replicates))
    for seed in range(5):
        found = estimate(arm_UR, reference_UR, seed=seed)
        assert found is not None and found.seeds is not None
        low, high = found.interval
        assert high - found.gain == pytest.approx(reach * found.seeds, rel=0.06)  # 400 strata
        assert found.gain - low == pytest.approx(high - found.gain)


def test_one_replicate_is_a_bootstrap_over_users_alone() -> None:
    rng = np.random.default_rng(6)
    reference_U = rng.random(40)
    arm_U = reference_U * rng.normal(0.97, 0.1, 40)
    gains_B = 1 - np.divide(*slow_resamples(np.stack([arm_U, reference_U], axis=1), 400, 0).T)
    found = estimate(arm_U[:, None], reference_U[:, None])
    assert found is not None and found.seeds is None
    assert found.interval == pytest.approx(np.quantile(gains_B, [0.025, 0.975]))


def test_pairing_takes_out_what_users_and_trainings_have_in_common() -> None:
    rng = np.random.default_rng(3)
    shared_UR = rng.gamma(0.5, 10.0, (300, 1)) * rng.normal(1.0, 0.1, (1, 4))
    arm_UR = 0.97 * shared_UR + rng.normal(0, 0.05, (300, 4))
    paired, unpaired = estimate(arm_UR, shared_UR), estimate(np.roll(arm_UR, (1, 1), (0, 1)), shared_UR)
    assert paired is not None and unpaired is not None
    assert paired.interval[0] > 0 > unpaired.interval[0]
    assert paired.interval[1] - paired.interval[0] < 0.1 * (unpaired.interval[1] - unpaired.interval[0])


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
    """Return the interval of picking both users and replicates with replacement, deviations of replicates scaled."""
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
    """Return how often the interval holds the truth: ours, that of picking replicates, and of picking them scaled."""
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


# The standard error of a share of .95 of 400 is .011.


@pytest.mark.parametrize("replicates", [2, 3, 4, 5])
def test_intervals_cover_the_truth_where_trainings_are_all_that_differs(replicates: int) -> None:
    found = coverage(replicates, by_user=0.002, by_training=0.003)
    assert 0.92 <= found["ours"] <= 0.98
    # Few values picked with replacement are too narrow, and still are with their variance put right.
    assert found["picked"] < 0.88 and found["picked"] < found["scaled"] < 0.91


def test_intervals_cover_the_truth_where_users_differ_too() -> None:
    ours = coverage(3, by_user=0.03, by_training=0.002)["ours"]
    assert 0.92 <= ours <= 0.99


def test_intervals_are_no_narrower_than_they_say_where_trainings_move_single_users() -> None:
    ours = coverage(4, by_user=0.01, by_training=0.002, by_both=0.05)["ours"]
    assert ours >= 0.93


def test_intervals_of_one_training_cover_the_truth_where_only_users_differ() -> None:
    ours = coverage(1, by_user=0.1, by_training=0.0)["ours"]
    assert 0.91 <= ours <= 0.98  # percentile intervals are known to run a little narrow
