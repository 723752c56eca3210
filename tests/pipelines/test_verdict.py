"""Verdicts and the reasons to withhold them: learning curves, sample sizes and training settings."""

from typing import Any

import pytest

from sidestack.pipelines.report.comparison import Gain, Learning, MetricResult, TaskResult, Training, Verdict
from sidestack.pipelines.report.config import VerdictConfig
from sidestack.pipelines.report.learning import summarize_learning
from sidestack.pipelines.report.outputs import Curve, RankerSummary
from sidestack.pipelines.report.training import differing_settings, training_of
from sidestack.pipelines.report.verdict import ONE_TRAINING, judge, roi_doubt, with_verdicts

RULES = VerdictConfig()
HEALTHY = Learning(train_ne=0.8, late_fall=0.01)
HIGHER, LOWER, EITHER = (Gain(gain=gain, interval=(gain - 0.01, gain + 0.01)) for gain in (0.02, -0.02, 0.005))


def curve(*values: float, step: int = 50) -> Curve:
    return [(float(step * place), value) for place, value in enumerate(values, start=1)]


def learned_click(train: Curve, validation: Curve | None = None, training: Training | None = None) -> Learning:
    curves = {"train_click_ne": train, "search_validation_click_ne": validation or []}
    found = summarize_learning([curves], [training or Training(steps=1)], "click")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("gain", "doubts", "trainings", "kind", "reasons"),
    [
        (HIGHER, (), 2, "better", ()),
        (LOWER, (), 2, "worse", ()),
        (EITHER, (), 2, "no difference shown", ()),
        (EITHER, (), 1, "no difference shown", ()),
        (HIGHER, (), 1, "withheld", (ONE_TRAINING,)),
        (LOWER, ("too few", "too few"), 1, "withheld", (ONE_TRAINING, "too few")),
        (EITHER, ("too few",), 3, "withheld", ("too few",)),
    ],
)
def test_a_gain_is_judged_only_without_doubts(
    gain: Gain, doubts: tuple[str, ...], trainings: int, kind: str, reasons: tuple[str, ...]
) -> None:
    assert judge(gain, doubts, trainings) == Verdict.model_validate({"kind": kind, "reasons": reasons})


def result(ne: float = 0.8, gain: Gain | None = None, **counts: Any) -> TaskResult:
    metrics = {"ne": MetricResult(value=ne, over={"none": gain} if gain else {})}
    return TaskResult(**{"num": 5000, "positives": 500, "users": 900, **counts}, metrics=metrics)


def reasons_of(side: Learning | None = HEALTHY, none: Learning | None = HEALTHY, **changes: Any) -> tuple[str, ...]:
    """Return why the verdict on the arm `side` is withheld."""
    results = {"none": result(**{**changes, "ne": 0.8}), "side": result(gain=HIGHER, **changes)}
    judged = with_verdicts(results, {"none": none, "side": side}, RULES, "none", 2)
    assert judged["none"].verdict is None and judged["side"].verdict is not None
    assert judged["side"].learning == side
    return judged["side"].verdict.reasons


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positives": 99}, "99 held-out positives, fewer than 100"),
        ({"positives": 4990}, "10 held-out negatives, fewer than 100"),
        ({"users": 16}, "16 held-out users, fewer than 100"),
        ({"ne": 0.996}, "side does not beat the base rate: NE 0.996 held out, 0.800 in training"),
        (
            {"side": Learning(train_ne=1.0, late_fall=0.0)},
            "side does not beat the base rate: NE 0.800 held out, 1.000 in training",
        ),
        (
            {"none": Learning(train_ne=0.8, late_fall=0.051)},
            "none has not converged: training NE fell by 5.1 % in the last quarter",
        ),
        (
            {"side": Learning(train_ne=0.8, late_fall=0.0, lowest_validation_ne=0.8, last_validation_ne=0.81)},
            "side overfits: validation NE rose from 0.8000 to 0.8100",
        ),
        (
            {"side": Learning(train_ne=0.8, late_fall=0.2, late_validation_fall=0.051)},
            "side has not converged: validation NE still fell by 5.1 %",
        ),
        ({"side": None}, "whether side has converged is not known: its learning curve has too few points"),
        (
            {"none": Learning(train_ne=0.8)},
            "whether none has converged is not known: its learning curve has too few points",
        ),
    ],
)
def test_verdict_is_withheld_when_data_or_training_is_insufficient(changes: dict[str, Any], reason: str) -> None:
    assert reasons_of(**changes) == (reason,)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positives": 100, "users": 100},
        {"ne": 0.995},
        {"side": Learning(train_ne=0.8, late_fall=0.08, late_fall_error=0.041)},  # within the scatter of the points
        {"side": Learning(train_ne=0.8, late_fall=0.2, late_validation_fall=0.01)},  # falls only in training
        {"side": Learning(train_ne=0.8, late_fall=-0.2, lowest_validation_ne=0.8, last_validation_ne=0.8079)},
    ],
)
def test_verdict_is_given_when_all_rules_hold(changes: dict[str, Any]) -> None:
    assert reasons_of(**changes) == ()


def test_curve_is_summarized_by_its_last_half() -> None:
    found = learned_click(curve(1.0, 0.9, 0.8, 0.78, 0.7, 0.68, 0.6, 0.58))
    assert found.train_ne == pytest.approx(0.59) and found.late_fall == pytest.approx(1 - 0.59 / 0.69)
    assert found.late_fall_error == pytest.approx((2 * 0.0002 / 2) ** 0.5 / 0.69)
    assert found.lowest_validation_ne is None


def test_points_of_a_curve_are_weighted_by_their_steps() -> None:
    found = learned_click([*curve(0.9, 0.8, 0.8, 0.7, 0.7, 0.6, 0.6), (352.0, 2.0)])
    assert found.train_ne == pytest.approx((50 * 0.6 + 50 * 0.6 + 2 * 2.0) / 102)


@pytest.mark.parametrize(
    ("train", "fall"),
    [
        (curve(1.0), None),
        ([(50.0, 1.1), (98.0, 0.99)], pytest.approx(0.1)),
        ([(500.0, 0.9), (510.0, 0.9)], None),
    ],
)
def test_late_fall_of_short_curves(train: Curve, fall: float | None) -> None:
    assert learned_click(train).late_fall == fall


def test_rising_validation_ne_is_detected() -> None:
    found = learned_click(curve(0.9, 0.8), curve(0.9, 0.82, 0.85))
    assert (found.lowest_validation_ne, found.last_validation_ne) == (0.82, 0.85)
    assert found.late_validation_fall == pytest.approx(1 - 0.85 / 0.82)
    assert learned_click(curve(0.9, 0.8), curve(0.9)).late_validation_fall is None


@pytest.mark.parametrize(
    ("epochs", "lowest", "last", "fall"),
    [(1, 0.9, 0.9, 1 - 0.82 / 0.9), (2, 0.82, 0.82, 1 - 0.85 / 0.82), (3, 0.82, 0.85, 1 - 0.85 / 0.82)],
)
def test_validation_counts_only_up_to_the_trained_epochs(epochs: int, lowest: float, last: float, fall: float) -> None:
    training = Training(steps=9, epochs=epochs, validation_days=7)
    found = learned_click(curve(0.9, 0.8), curve(0.9, 0.82, 0.85), training)
    assert (found.lowest_validation_ne, found.last_validation_ne) == (lowest, last)
    assert found.late_validation_fall == pytest.approx(fall)


def test_replicates_are_averaged() -> None:
    first, second = (
        {"train_click_ne": curve(1.0, 1.0, last_but_one, last), "search_validation_click_ne": curve(last)}
        for last_but_one, last in ((0.8, 0.6), (0.7, 0.5))
    )
    found = summarize_learning([first, second], [Training(), Training()], "click")
    assert found is not None
    assert (found.train_ne, found.last_validation_ne) == pytest.approx((0.55, 0.55))
    assert found.late_fall == pytest.approx(1 - 0.55 / 0.75)
    assert summarize_learning([first, {}], [Training(), Training()], "click") is None


def test_the_error_of_a_fall_shrinks_with_replicates() -> None:
    one = {"train_click_ne": curve(1.0, 0.9, 0.8, 0.78, 0.7, 0.68, 0.6, 0.58)}
    single, double = (
        summarize_learning([one], [Training()], "click"),
        summarize_learning([one, one], [Training(), Training()], "click"),
    )
    assert single is not None and double is not None and single.late_fall_error and double.late_fall_error
    assert double.late_fall_error == pytest.approx(single.late_fall_error / 2**0.5)


def test_arm_without_steps_needs_no_curve() -> None:
    results = {"none": result(), "trees": result(gain=HIGHER)}
    judged = with_verdicts(results, {"none": HEALTHY}, RULES, "none", 2)
    assert judged["trees"].verdict == Verdict(kind="better") and judged["trees"].learning is None


def test_roi_needs_gains_and_a_cost() -> None:
    withheld, better = Verdict(kind="withheld", reasons=("few",)), Verdict(kind="better")
    tasks = {"click": result().model_copy(update={"verdict": better}), "order": result()}
    assert roi_doubt(tasks, 6.0, RULES) == ""
    assert roi_doubt(tasks, 0.92, RULES) == "a feature of 0.92 B a row, less than 2 B, is divided by"
    tasks["order"] = result().model_copy(update={"verdict": withheld})
    assert roi_doubt(tasks, 6.0, RULES) == "gains are withheld"


SECTION: dict[str, Any] = {
    "arm": "none",
    "arms": {"none": {"item": "none", "overlay": {}}},
    "model": {"history": {"heads": 1}},
    "training": {"epochs": 2, "batch_size": 512, "sparse_learning_rate": 0.05, "seed": 0},
}


def test_settings_that_differ_are_named_with_their_values() -> None:
    side = {**SECTION, "arm": "side", "arms": {"side": {"item": "side", "overlay": {}}}}
    side["training"] = {**SECTION["training"], "sparse_learning_rate": 0.1}
    assert list(differing_settings({"none": SECTION, "side": side, "other": side, "unknown": {}})) == [
        "content.item: none in none; side in side, other",
        "training.sparse_learning_rate: 0.05 in none; 0.1 in side, other",
    ]
    assert list(differing_settings({"none": SECTION})) == []


def summary(**changes: Any) -> RankerSummary:
    given = {"steps": 98, "budget": {"batch_size": 256, "validation_days": 7, "by_rule": ("batch_size",)}}
    return RankerSummary.model_construct(**{**given, **changes})


def test_training_has_the_settings_that_are_known() -> None:
    training = training_of(summary(budget={}), SECTION)
    assert (training.steps, training.epochs, training.batch_size, training.dense_learning_rate) == (98, 2, 512, None)
    assert training_of(summary(steps=None, budget={}), {}) == Training()


def test_training_names_the_settings_decided_by_a_rule() -> None:
    left_open = {**SECTION, "training": {**SECTION["training"], "batch_size": None, "validation_days": None}}
    training = training_of(summary(), left_open)
    assert (training.batch_size, training.validation_days, training.by_rule) == (256, 7, ("batch_size",))
