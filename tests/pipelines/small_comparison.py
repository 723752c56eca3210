"""A small comparison written by hand, for tests of the report."""

from collections.abc import Mapping
from typing import Any

from sidestack.infra.tables import TaskSpec
from sidestack.pipelines.report.comparison import (
    ArmResult,
    Comparison,
    DecileResult,
    EncoderResult,
    Gain,
    IdTable,
    LabelCounts,
    Learning,
    MetricResult,
    Segment,
    SignalLoss,
    TaskResult,
    Training,
)
from sidestack.pipelines.report.config import VerdictConfig
from sidestack.pipelines.report.drawing import Plot
from sidestack.pipelines.report.figures import plots
from sidestack.pipelines.report.outputs import Curve
from sidestack.pipelines.report.page import RunFile, render_page
from sidestack.pipelines.report.verdict import with_verdicts
from sidestack.ranker.metric_registry import all_metrics

CLICK: dict[str, Curve] = {
    "none": [(50.0, 0.9), (100.0, 0.7), (150.0, 0.68)],
    "sid_ngram": [(50.0, 0.9), (100.0, 0.69), (150.0, 0.679)],
    "side": [(50.0, 0.8), (100.0, 0.66), (150.0, 0.64)],
}
CURVES = {name: {"train_click_ne": curve, "train_conversion_ne": curve} for name, curve in CLICK.items()}


def task(ne: float, reference: float, spread: float, over: dict[str, Gain] | None = None) -> TaskResult:
    gain = 1 - ne / reference
    is_reference = ne == reference
    gains = {} if is_reference else {"none": between(gain, spread, spread), **(over or {})}
    in_auc = {} if is_reference else {"none": between(gain / 10, 0.001, 0.002)}
    in_gauc = {} if is_reference else {"none": between(gain / 5, 0.002, 0.002)}
    metrics = {
        "ne": MetricResult(value=ne, replicates=(ne - 0.001, ne + 0.001), over=gains),
        "auc": MetricResult(value=0.88, over=in_auc),
        "gauc": MetricResult(value=0.8, over=in_gauc, counts={"users": 1200, "rows": 9000}),
        "calibration": MetricResult(value=1.01),
    }
    return TaskResult(
        num=12_000, positives=1100, users=2301, metrics=metrics, deciles=DECILES,
        segments={kind: segments(gains.get("none")) for kind in ("user", "item")},
    )  # fmt: skip


def between(gain: float, below: float, above: float) -> Gain:
    return Gain(gain=gain, interval=(gain - below, gain + above), replicates=(0.001, 0.004), seeds=0.0021)


def undefined_task(num: int, positives: int) -> TaskResult:
    """Return the results of a task whose metrics are not defined."""
    return TaskResult(num=num, positives=positives, metrics={name: MetricResult(value=None) for name in all_metrics()})


DECILES = tuple(DecileResult(rows=1200, predicted=0.05 * step, observed=0.04 * step) for step in range(10))


def segments(gain: Gain | None) -> tuple[Segment, ...]:
    few = Segment(name="0", rows=12, users=3, positives=1, gain=None)
    return few, Segment(name="1-2", rows=11_988, users=2000, positives=1099, gain=gain)


def arm(click: TaskResult, conversion: TaskResult, **costs: Any) -> ArmResult:
    given = {
        "sid_table_bytes": 0, "table_bytes": 12_690_000, "feature_bytes_per_row": 0.0, "samples_per_second": 12_345.6,
        "peak_memory_bytes": 1_300_000_000, "train_seconds": 61.2, "parameters": 3_200_000, "world_size": 2,
        "flops_per_sample": 254_321.0,
        "roi": None,
        "training": Training(
            steps=564, epochs=1, batch_size=1024, sparse_learning_rate=0.0125, dense_learning_rate=0.004
        ),
    }  # fmt: skip
    return ArmResult(tasks={"click": click, "conversion": conversion}, **{**given, **costs})


USERS = IdTable(
    table="t_user_id", is_sid=False, possible_ids=2_469, distinct_ids=2_300, rows=2_469, collision_share=0.0,
    bytes=316_032, held_out_ids=1_000, never_seen=5,
)  # fmt: skip
PREFIXES = IdTable(
    table="t_item_sid_prefix_10", is_sid=True, possible_ids=59_049, distinct_ids=9_000, rows=4_096,
    collision_share=0.889, bytes=524_288, held_out_ids=1_000, never_seen=120,
)  # fmt: skip
NO_FILE = RunFile("", "nobody wrote it")
LEARNED = Learning(train_ne=0.66, late_fall=0.01)


def comparison(
    learning: Mapping[str, Learning | None] | None = None, rules: VerdictConfig | None = None, **changes: Any
) -> Comparison:
    """Return a judged comparison with two trainings of each arm; `learning` replaces the learning of some arms."""
    given, rules = unjudged(**changes), rules or VerdictConfig()
    results = {task: {name: one.tasks[task] for name, one in given.arms.items()} for task in given.tasks}
    learnings = {name: (learning or {}).get(name, LEARNED) for name in given.arms}
    judged = {
        task: with_verdicts(of_task, learnings, rules, given.reference, given.replicates)
        for task, of_task in results.items()
    }
    arms = {
        name: one.model_copy(update={"tasks": {task: judged[task][name] for task in given.tasks}})
        for name, one in given.arms.items()
    }
    return given.model_copy(update={"arms": arms, "rules": rules})


def unjudged(**changes: Any) -> Comparison:
    over_ngram = {"sid_ngram": Gain(gain=0.038, interval=(0.03, 0.046))}
    arms = {
        "none": arm(task(0.6678, 0.6678, 0.0), task(0.95, 0.95, 0.0), tables=(USERS,)),
        "sid_ngram": arm(
            task(0.6597, 0.6678, 0.004), task(0.9495, 0.95, 0.002),
            sid_table_bytes=100_663_296, table_bytes=113_353_296, feature_bytes_per_row=1224.0, roi=0.0053,
            tables=(USERS, PREFIXES),
        ),
        "side": arm(
            task(0.6347, 0.6678, 0.009, over_ngram), task(0.93, 0.95, 0.01),
            feature_bytes_per_row=408.0, roi=0.0886,
        ),
    }  # fmt: skip
    encoder = EncoderResult(
        items=500, unique_share=0.87, entropy_bits=(1.5, 1.4), most_bits=1.585,
        histogram=((100, 200, 200), (50, 250, 200)),
        losses=(
            SignalLoss(name="text", kind="cosine", loss=0.21, top1=None),
            SignalLoss(name="brand", kind="cross-entropy", loss=2.4, top1=0.487),
        ),
    )  # fmt: skip
    given: dict[str, Any] = {
        "reference": "none", "confidence": 0.95, "resamples": 1000, "seed": 0, "rows": 291_204, "users": 2301,
        "origin": "made by hand", "train": ("2017-09-10", "2017-11-11"), "held_out": ("2017-11-12", "2017-12-09"),
        "config_digest": "c0ffee" * 10, "versions": {"torch": "2.13.0"}, "inputs": {"arm.none": "ab" * 32},
        "warnings": (), "arms": arms, "encoder": encoder,
        "replicates": 2, "differs": ("training.seed: 0 in none; 1 in side",),
        "trained_on": {"click": LabelCounts(rows=98_000, positives=9_000)},
        "earlier_task": "click", "tasks": {"click": TaskSpec(), "conversion": TaskSpec(given="click")},
    }  # fmt: skip
    return Comparison(**{**given, **changes})


def all_plots() -> tuple[Plot, ...]:
    return plots(comparison(), CURVES)


def page(**changes: Any) -> str:
    configs = {"arm.none": "arm: none\n", "dataset": ""}
    return render_page(comparison(**changes), all_plots()[:2], configs, RunFile("run: {name: again}\n"))
