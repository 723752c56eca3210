"""The comparison's statistics, each against a slow reference or a law it must keep."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ranker import statistics
from ranker.statistics import (
    gain,
    gain_interval,
    log_loss,
    resample_users,
    return_on_investment,
    sum_by_user,
    task_metrics,
)

Rows = list[tuple[int, float]]
rows_of_both_labels = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.01, 0.2, 0.2, 0.5, 0.9, 1.0])), min_size=2, max_size=40
).filter(lambda rows: len({label for label, _ in rows}) == 2)


def arrays(rows: Rows) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    labels, scores = zip(*rows, strict=True)
    return np.array(labels, np.int8), np.array(scores, np.float32)


def slow_log_loss(label: int, score: float) -> float:
    score = min(max(score, statistics.EPSILON), 1 - statistics.EPSILON)
    return -math.log(score) if label else -math.log(1 - score)


def slow_ne(rows: Rows) -> float:
    rate = sum(label for label, _ in rows) / len(rows)
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    return sum(slow_log_loss(*row) for row in rows) / len(rows) / entropy


def slow_auc(rows: Rows) -> float:
    positives = [score for label, score in rows if label]
    negatives = [score for label, score in rows if not label]
    wins = sum((up > down) + 0.5 * (up == down) for up in positives for down in negatives)
    return wins / len(positives) / len(negatives)


@given(rows_of_both_labels)
def test_metrics_equal_the_slow_reference(rows: Rows) -> None:
    labels_N, scores_N = arrays(rows)
    exact = [(int(label), float(score)) for label, score in zip(labels_N, scores_N, strict=True)]
    found = task_metrics(labels_N, scores_N)
    assert (found.num, found.positives) == (len(rows), sum(label for label, _ in rows))
    assert found.ne == pytest.approx(slow_ne(exact), rel=1e-9)
    assert found.auc == pytest.approx(slow_auc(exact), abs=1e-12)
    assert found.calibration == pytest.approx(sum(score for _, score in exact) / found.positives)


def test_ne_equals_torchrecs() -> None:
    from torchrec.metrics.ne import compute_ne, get_ne_states

    rng = np.random.default_rng(0)
    labels_N, scores_N = rng.integers(0, 2, 500), rng.random(500)
    label, score, weight = (torch.tensor(x)[None] for x in (labels_N, scores_N, np.ones(500)))
    states = get_ne_states(label.double(), score, weight, statistics.EPSILON)
    theirs = compute_ne(*states.values(), statistics.EPSILON)
    assert task_metrics(labels_N, scores_N).ne == pytest.approx(theirs.item(), rel=1e-9)


def test_predicting_the_base_rate_has_ne_one_and_auc_half() -> None:
    found = task_metrics(np.array([1, 0, 0, 0]), np.full(4, 0.25))
    assert (found.ne, found.auc, found.calibration) == (pytest.approx(1.0), 0.5, 1.0)


@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1]])
def test_without_both_labels_ne_and_auc_are_undefined(labels: list[int]) -> None:
    found = task_metrics(np.array(labels, np.int8), np.full(len(labels), 0.5))
    assert found.ne is None and found.auc is None
    assert found.calibration == (0.5 if 1 in labels else None)


def test_a_sure_and_wrong_prediction_costs_a_finite_loss() -> None:
    losses_N = log_loss(np.array([1, 0]), np.array([0.0, 1.0], np.float32))
    assert losses_N == pytest.approx([-math.log(statistics.EPSILON)] * 2, rel=1e-4)


def test_sum_by_user_equals_a_loop() -> None:
    rng = np.random.default_rng(1)
    users_N, losses_N = rng.integers(0, 30, 200) * 1_000_003, rng.random(200)
    expected: dict[int, float] = {}
    for user, loss in zip(users_N.tolist(), losses_N.tolist(), strict=True):
        expected[user] = expected.get(user, 0.0) + loss
    users_U, sums_U = sum_by_user(users_N, losses_N)
    assert users_U.tolist() == sorted(expected)
    assert sums_U == pytest.approx([expected[user] for user in sorted(expected)])


def slow_resamples(losses_UA: NDArray[np.float64], num_resamples: int, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(losses_UA), len(losses_UA)) for _ in range(num_resamples)]
    return np.array([losses_UA[drawn].sum(axis=0) for drawn in draws])


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32), st.integers(1, 100))
def test_resamples_equal_drawing_users_one_resample_at_a_time(users: int, arms: int, seed: int, chunk: int) -> None:
    losses_UA = np.random.default_rng(seed).random((users, arms))
    before = statistics._CHUNK_COUNTS
    statistics._CHUNK_COUNTS = chunk
    try:
        found_BA = resample_users(losses_UA, 11, seed)
    finally:
        statistics._CHUNK_COUNTS = before
    np.testing.assert_allclose(found_BA, slow_resamples(losses_UA, 11, seed), rtol=1e-12)


def test_resampling_no_users_gives_no_loss_and_no_interval() -> None:
    sums_BA = resample_users(np.empty((0, 2)), 5, seed=0)
    assert sums_BA.tolist() == [[0.0, 0.0]] * 5
    assert gain_interval(sums_BA[:, 0], sums_BA[:, 1], 0.95) is None


def test_an_arm_gains_nothing_over_itself() -> None:
    sums_BA = resample_users(np.random.default_rng(2).random((50, 1)), 200, seed=0)
    assert gain_interval(sums_BA[:, 0], sums_BA[:, 0], 0.95) == (0.0, 0.0)
    assert gain(0.7, 0.7) == 0.0
    assert gain(0.7, 0.0) is None


def test_pairing_takes_out_what_users_have_in_common() -> None:
    rng = np.random.default_rng(3)
    shared_U = rng.gamma(0.5, 10.0, 300)
    losses_UA = np.stack([shared_U, 0.97 * shared_U + rng.normal(0, 0.05, 300)], axis=1)
    sums_BA = resample_users(losses_UA, 500, seed=0)
    paired = gain_interval(sums_BA[:, 1], sums_BA[:, 0], 0.95)
    unpaired = gain_interval(sums_BA[:, 1], np.roll(sums_BA[:, 0], 1), 0.95)
    assert paired is not None and unpaired is not None
    assert paired[0] > 0 > unpaired[0]
    assert paired[1] - paired[0] < 0.1 * (unpaired[1] - unpaired[0])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(4)
    trials, users, true_gain = 300, 120, 0.04
    covered = 0
    for trial in range(trials):
        reference_U = rng.gamma(2.0, 3.0, users)
        arm_U = reference_U * (1 - true_gain + rng.normal(0, 0.2, users))
        sums_BA = resample_users(np.stack([reference_U, arm_U], axis=1), 400, seed=trial)
        low, high = gain_interval(sums_BA[:, 1], sums_BA[:, 0], 0.9) or (1.0, 0.0)
        covered += low <= true_gain <= high
    # The standard error of the share is 0.017; percentile intervals are known to run a little narrow.
    assert 0.84 <= covered / trials <= 0.95


@pytest.mark.parametrize(
    ("gains", "cost", "baseline_gains", "times"),
    [
        ((0.0085, 0.0101), 0.23, (0.0108, 0.0037), 5.57),  # Table 3: SID against k-means
        ((0.0185, 0.0111), 0.33, (0.0082, 0.0086), 5.33),  # Table 4: SIDE against SID, DPCA
        ((0.0284, 0.0124), 0.33, (0.0100, 0.0067), 7.40),  # Table 5: SIDE against SID, VQ fusion
    ],
)
def test_roi_gives_the_papers_tables(
    gains: tuple[float, float], cost: float, baseline_gains: tuple[float, float], times: float
) -> None:
    mine, baseline = return_on_investment(gains, cost), return_on_investment(baseline_gains, 1.0)
    assert mine is not None and baseline is not None
    assert mine / baseline == pytest.approx(times, abs=0.01)


def test_roi_is_undefined_without_a_cost_or_a_gain() -> None:
    assert return_on_investment((0.1, 0.2), 0.0) is None
    assert return_on_investment((), 1.0) is None
    assert return_on_investment((0.1, 0.2), 1.5) == pytest.approx(0.1)
