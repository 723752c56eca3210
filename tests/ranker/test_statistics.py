"""The metrics of one arm, each compared with a slow reference or a known property, in batches cut anywhere."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sidestack.ranker import statistics
from sidestack.ranker.intervals import resample_users
from sidestack.ranker.metric_registry import AUC, CALIBRATION, GAUC, NE, Metric
from sidestack.ranker.statistics import Decile, DecileTally, Measure, Rows, log_loss, return_on_investment
from tests.ranker import in_memory

Integers = NDArray[np.int64]


def feed(tally: Any, users: Any, labels: Any, scores: Any, order_N: Integers, batch: int = 3) -> None:
    """Add rows to a tally in this order, in batches of growing size."""
    users_N, place_N = np.unique(np.asarray(users, np.int64), return_inverse=True)
    labels_N, scores_N = np.asarray(labels, np.int8), np.asarray(scores, np.float64)
    start = 0
    while start < len(order_N):
        part = order_N[start : start + batch]
        tally.add(Rows(place_N[part], {"user": users_N[place_N[part]]}, labels_N[part], scores_N[part]))
        start, batch = start + batch, batch + 1


def measured(metric: Metric, labels: Any, scores: Any, users: Any = None, batch: int = 3) -> Measure:
    """Measure a metric on rows of some users, by default of one."""
    users = np.zeros(len(labels), np.int64) if users is None else np.asarray(users, np.int64)
    keys = {"row": (np.zeros(len(users)),), "score": (scores,), "user": (scores, users)}[metric.order]
    tally = metric.tally(len(np.unique(users)))
    feed(tally, users, labels, scores, np.lexsort(keys), batch)
    return tally.measure()


Labelled = list[tuple[int, float]]
rows_of_both_labels = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.01, 0.2, 0.2, 0.5, 0.9, 1.0])), min_size=2, max_size=40
).filter(lambda rows: len({label for label, _ in rows}) == 2)


def arrays(rows: Labelled) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    labels, scores = zip(*rows, strict=True)
    return np.array(labels, np.int8), np.array(scores, np.float32)


def slow_log_loss(label: int, score: float) -> float:
    score = min(max(score, statistics.EPSILON), 1 - statistics.EPSILON)
    return -math.log(score) if label else -math.log(1 - score)


def slow_ne(rows: Labelled) -> float:
    rate = sum(label for label, _ in rows) / len(rows)
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    return sum(slow_log_loss(*row) for row in rows) / len(rows) / entropy


def slow_auc(rows: Labelled) -> float:
    positives = [score for label, score in rows if label]
    negatives = [score for label, score in rows if not label]
    wins = sum((up > down) + 0.5 * (up == down) for up in positives for down in negatives)
    return wins / len(positives) / len(negatives)


@given(rows_of_both_labels)
def test_metrics_equal_the_slow_reference(rows: Labelled) -> None:
    labels_N, scores_N = arrays(rows)
    exact = [(int(label), float(score)) for label, score in zip(labels_N, scores_N, strict=True)]
    assert measured(NE, labels_N, scores_N).value == pytest.approx(slow_ne(exact), rel=1e-9)
    assert measured(AUC, labels_N, scores_N).value == pytest.approx(slow_auc(exact), abs=1e-12)
    predicted, positives = sum(score for _, score in exact), sum(label for label, _ in rows)
    assert measured(CALIBRATION, labels_N, scores_N).value == pytest.approx(predicted / positives)


def test_ne_equals_that_of_torchrec() -> None:
    from torchrec.metrics.ne import compute_ne, get_ne_states

    rng = np.random.default_rng(0)
    labels_N, scores_N = rng.integers(0, 2, 500), rng.random(500)
    label, score, weight = (torch.tensor(x)[None] for x in (labels_N, scores_N, np.ones(500)))
    states = get_ne_states(label.double(), score, weight, statistics.EPSILON)
    theirs = compute_ne(*states.values(), statistics.EPSILON)
    assert measured(NE, labels_N, scores_N).value == pytest.approx(theirs.item(), rel=1e-9)


def test_predicting_the_base_rate_has_ne_one_and_auc_half() -> None:
    found = [measured(metric, [1, 0, 0, 0], np.full(4, 0.25)).value for metric in (NE, AUC, CALIBRATION)]
    assert found == [pytest.approx(1.0), 0.5, 1.0]


@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1]])
def test_without_both_labels_ne_and_auc_are_undefined(labels: list[int]) -> None:
    found = {metric: measured(metric, labels, np.full(len(labels), 0.5)) for metric in (NE, AUC, GAUC, CALIBRATION)}
    assert found[NE].value is None and found[AUC].value is None and found[GAUC].value is None
    assert found[CALIBRATION].value == (0.5 if 1 in labels else None)
    assert found[AUC].parts_U.tolist() == [0.0] * min(len(labels), 1)  # one user, or none


def test_certain_and_wrong_prediction_has_a_finite_loss() -> None:
    losses_N = log_loss(np.array([1, 0]), np.array([0.0, 1.0], np.float32))
    assert losses_N == pytest.approx([-math.log(statistics.EPSILON)] * 2, rel=1e-4)


Users = list[tuple[int, int, float]]
rows_of_some_users = st.lists(
    st.tuples(st.sampled_from([3, 5, 900_001]), st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.1, 0.5, 0.9])),
    max_size=30,
)


@given(rows_of_some_users)
def test_auc_by_user_equals_auc_of_each_user_alone(rows: Users) -> None:
    expected = {}
    for user in {user for user, *_ in rows}:
        own = [(label, score) for other, label, score in rows if other == user]
        if len({label for label, _ in own}) == 2:
            expected[user] = (slow_auc(own), len(own))
    users, labels, scores = (np.array(column) for column in zip(*rows, strict=True)) if rows else np.empty((3, 0))
    found = measured(GAUC, labels, scores, users)
    parts = [math.prod(expected.get(user, (0.0, 0))) for user in sorted({user for user, *_ in rows})]
    assert found.parts_U == pytest.approx(parts, abs=1e-12)
    assert found.counts == {"users": len(expected), "rows": sum(num for _, num in expected.values())}


def test_gauc_weighs_users_by_rows_and_leaves_out_those_of_one_label() -> None:
    users_N = np.array([1, 1, 2, 2, 2, 3, 3])
    labels_N = np.array([0, 1, 1, 0, 0, 1, 1])
    found = measured(GAUC, labels_N, np.array([0.1, 0.2, 0.5, 0.4, 0.6, 0.1, 0.9]), users_N)
    assert found.counts == {"users": 2, "rows": 5}
    assert found.value == pytest.approx((2 * 1.0 + 3 * 0.5) / 5)
    assert measured(GAUC, labels_N[5:], np.array([0.1, 0.9]), users_N[5:]).value is None


def slow_weighted_auc(rows: Users, weight_of: dict[int, complex]) -> complex:
    """Return AUC with every row weighted by the weight of its user."""
    ups = [(weight_of[user], score) for user, label, score in rows if label]
    downs = [(weight_of[user], score) for user, label, score in rows if not label]
    won = sum(w * v * ((up > down) + 0.5 * (up == down)) for w, up in ups for v, down in downs)
    return won / sum(w for w, _ in ups) / sum(v for v, _ in downs)


@given(rows_of_some_users.filter(lambda rows: len({label for _, label, _ in rows}) == 2))
def test_auc_influence_is_the_derivative_by_a_users_weight(rows: Users) -> None:
    users, labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    known = np.unique(users)
    found = measured(AUC, labels, scores, users)
    assert found.value is not None
    found_U = found.parts_U - found.value / len(known)
    # A complex step gives the derivative without cancellation.
    ones: dict[int, complex] = dict.fromkeys(known.tolist(), 1.0)
    expected = [slow_weighted_auc(rows, {**ones, user: 1.0 + 1e-20j}).imag / 1e-20 for user in known.tolist()]
    assert found_U == pytest.approx(expected, abs=1e-12)
    assert found_U.sum() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 6], ids=["ties", "no ties"])
def test_first_order_auc_has_the_deviation_over_users_of_auc(decimals: int) -> None:
    rng = np.random.default_rng(8)
    users_N = np.concatenate([np.arange(60), rng.integers(0, 60, 900)])
    logit_N = rng.normal(-1.0, 1.0, 960) + rng.normal(0.0, 0.8, 60)[users_N]
    labels_N = (rng.random(960) < 1 / (1 + np.exp(-logit_N))).astype(np.int8)
    scores_N = np.round(1 / (1 + np.exp(-logit_N - rng.normal(0, 0.7, 960))), decimals)
    assert (len(np.unique(scores_N)) < 12) == (decimals == 1)
    parts_U = measured(AUC, labels_N, scores_N, users_N).parts_U
    found_B = resample_users(parts_U[:, None], 1000, seed=0)[:, 0]
    draws_BU = np.random.default_rng(0).integers(0, 60, (1000, 60))  # the same resamples
    rows_of = [np.flatnonzero(users_N == user) for user in range(60)]
    drawn = (np.concatenate([rows_of[user] for user in draw_U]) for draw_U in draws_BU)
    exact_B = np.array([in_memory.task_metrics(labels_N[rows], scores_N[rows]).auc for rows in drawn], np.float64)
    assert found_B.std() == pytest.approx(exact_B.std(), rel=0.03)
    assert found_B.mean() == pytest.approx(exact_B.mean(), abs=0.1 * exact_B.std())
    assert np.corrcoef(found_B, exact_B)[0, 1] > 0.99


def deciles(labels: Any, scores: Any, batch: int = 3) -> tuple[Decile, ...]:
    tally = DecileTally(len(labels))
    feed(tally, np.zeros(len(labels)), labels, scores, np.argsort(scores, kind="stable"), batch)
    return tally.deciles()


def test_deciles_compare_prediction_with_outcome() -> None:
    rng = np.random.default_rng(5)
    scores_N = rng.random(1003).astype(np.float32)
    labels_N = (rng.random(1003) < scores_N**2).astype(np.int8)
    found = deciles(labels_N, scores_N)
    order = sorted(range(1003), key=lambda row: scores_N[row])
    sizes = [101] * 3 + [100] * 7
    start = 0
    assert [one.rows for one in found] == sizes
    for one in found:
        rows = order[start : start + one.rows]
        assert one.predicted == pytest.approx(np.mean([float(scores_N[row]) for row in rows]))
        assert one.observed == pytest.approx(np.mean([labels_N[row] for row in rows]))
        start += one.rows
    assert len(deciles([1, 0, 1], np.array([0.2, 0.1, 0.3]))) == 3


@pytest.mark.parametrize("decimals", [0, 1, 6], ids=["one tie", "ties", "no ties"])
def test_batches_give_the_results_of_all_rows_at_once_wherever_they_are_cut(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    users_N, labels_N = rng.integers(0, 40, 2000), (rng.random(2000) < 0.3).astype(np.int8)
    scores_N = 0.1 + np.round(rng.random(2000) * 0.4, decimals)
    users_U, place_N = np.unique(users_N, return_inverse=True)
    plain, by_user = in_memory.task_metrics(labels_N, scores_N), in_memory.auc_by_user(users_N, labels_N, scores_N)
    assert plain.ne and plain.auc and plain.calibration and by_user.gauc
    losses_U = np.bincount(place_N, weights=log_loss(labels_N, scores_N))
    influence_U = in_memory.auc_influence(place_N, labels_N, scores_N)
    gauc_U = np.zeros(len(users_U))
    gauc_U[np.searchsorted(users_U, by_user.users_V)] = by_user.auc_V * by_user.rows_V
    expected = {
        NE: (plain.ne, losses_U), AUC: (plain.auc, plain.auc / len(users_U) + influence_U),
        GAUC: (by_user.gauc, gauc_U), CALIBRATION: (plain.calibration, None),
    }  # fmt: skip
    for metric, (value, parts_U) in expected.items():
        found, otherwise = (measured(metric, labels_N, scores_N, users_N, batch) for batch in (1, 700))
        assert found.value == pytest.approx(value, rel=1e-12)
        assert parts_U is None or found.parts_U == pytest.approx(parts_U, rel=1e-11, abs=1e-14)
        assert (found.value, found.parts_U.tolist()) == (otherwise.value, otherwise.parts_U.tolist())
    assert np.array(deciles(labels_N, scores_N)) == pytest.approx(
        np.array(in_memory.calibration_deciles(labels_N, scores_N)), rel=1e-12
    )
    assert deciles(labels_N, scores_N, 1) == deciles(labels_N, scores_N, 700)


def test_tie_over_many_batches_is_stored_per_user_and_not_per_row() -> None:
    tally = statistics.AucTally(5)
    users_N, labels_N = np.arange(1000) % 5, (np.arange(1000) % 3 == 0).astype(np.int8)
    feed(tally, users_N, labels_N, np.full(1000, 0.1), np.arange(1000))
    assert len(tally._pairs._held.users_C) == 5
    assert tally.measure().value == 0.5


@pytest.mark.parametrize(
    ("gains", "cost", "baseline_gains", "times"),
    [
        ((0.0085, 0.0101), 0.23, (0.0108, 0.0037), 5.57),  # Table 3: SID against k-means
        ((0.0185, 0.0111), 0.33, (0.0082, 0.0086), 5.33),  # Table 4: SIDE against SID, DPCA
        ((0.0284, 0.0124), 0.33, (0.0100, 0.0067), 7.40),  # Table 5: SIDE against SID, VQ fusion
    ],
)
def test_roi_reproduces_the_tables_of_the_paper(
    gains: tuple[float, float], cost: float, baseline_gains: tuple[float, float], times: float
) -> None:
    mine, baseline = return_on_investment(gains, cost), return_on_investment(baseline_gains, 1.0)
    assert mine is not None and baseline is not None
    assert mine / baseline == pytest.approx(times, abs=0.01)


def test_roi_is_undefined_without_a_cost_or_a_gain() -> None:
    assert return_on_investment((0.1, 0.2), 0.0) is None
    assert return_on_investment((), 1.0) is None
    assert return_on_investment((0.1, 0.2), 1.5) == pytest.approx(0.1)
