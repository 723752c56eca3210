"""The verdict on a gain: what it shows, or why nothing can be concluded from it.

An interval covers the variation over the drawn users, and over trainings if there are several. It does not show whether
the trainings learned anything. Problems of an arm's training or of the rows are collected here as *doubts*; a gain
between two arms is judged only if neither has any.
"""

from collections.abc import Iterator, Mapping, Sequence

from sidestack.pipelines.report.comparison import Comparison, Gain, Learning, Segment, TaskResult, Verdict
from sidestack.pipelines.report.config import VerdictConfig
from sidestack.ranker.metric_registry import HEADLINE

ONE_TRAINING = "one training: not a result"
"""Reason that holds for any interval, which is over users only then: another seed may reverse the gain."""


def judge(gain: Gain, doubts: Sequence[str], trainings: int) -> Verdict:
    """Return the verdict on a gain.

    Args:
        gain: of one arm over another.
        doubts: doubts about either of them.
        trainings: number of trainings of each. With one, no difference is a result.
    """
    reasons = [ONE_TRAINING] if trainings == 1 and not gain.holds_zero else []
    reasons += [doubt for doubt in dict.fromkeys(doubts) if doubt not in reasons]
    if reasons:
        return Verdict(kind="withheld", reasons=tuple(reasons))
    if gain.holds_zero:
        return Verdict(kind="no difference shown")
    return Verdict(kind="better" if gain.gain > 0 else "worse")


def with_verdicts(
    results: Mapping[str, TaskResult],
    learning: Mapping[str, Learning | None],
    rules: VerdictConfig,
    reference: str,
    trainings: int,
) -> dict[str, TaskResult]:
    """Return every arm's results on a task with its learning, its doubts and the verdict over the reference.

    Args:
        results: by arm.
        learning: by arm that takes steps; None if its training has no curve.
        rules: when verdicts are withheld.
        reference: the arm over which gains are computed. trainings: number for each arm.
    """
    doubts = {name: tuple(_doubts(name, one, learning, rules)) for name, one in results.items()}
    judged = {}
    for name, result in results.items():
        gain = result.gain(HEADLINE.name, reference)
        verdict = judge(gain, (*doubts[name], *doubts[reference]), trainings) if gain else None
        changes = {"learning": learning.get(name), "doubts": doubts[name], "verdict": verdict}
        judged[name] = result.model_copy(update=changes)
    return judged


def _doubts(
    name: str, result: TaskResult, learning: Mapping[str, Learning | None], rules: VerdictConfig
) -> Iterator[str]:
    """Return why one arm on one task cannot show a difference to any other."""
    yield from _too_few(result.num, result.positives, result.users, rules)
    yield from _not_learned(name, result, learning.get(name), rules)
    if name in learning:
        yield from _not_converged(name, learning[name], rules)
        yield from _overfitted(name, learning[name], rules)


def _too_few(num: int, positives: int, users: int | None, rules: VerdictConfig) -> Iterator[str]:
    for count, what in ((positives, "positives"), (num - positives, "negatives")):
        if count < rules.min_positives:
            yield f"{count:,} held-out {what}, fewer than {rules.min_positives:,}"
    if users is not None and users < rules.min_users:
        yield f"{users:,} held-out users, fewer than {rules.min_users:,}"


def _not_learned(name: str, result: TaskResult, learning: Learning | None, rules: VerdictConfig) -> Iterator[str]:
    found = {"held out": result.metrics[HEADLINE.name].value, "in training": learning.train_ne if learning else None}
    known = {where: ne for where, ne in found.items() if ne is not None}
    if any(ne > 1.0 - rules.min_learned for ne in known.values()):
        values = ", ".join(f"{ne:.3f} {where}" for where, ne in known.items())
        yield f"{name} does not beat the base rate: {HEADLINE.title} {values}"


def _not_converged(name: str, learning: Learning | None, rules: VerdictConfig) -> Iterator[str]:
    if learning is not None and learning.late_validation_fall is not None:
        # Validation decides if there is any: training NE falls anyway when rows are seen again.
        if learning.late_validation_fall > rules.max_late_fall:
            reason = f"validation {HEADLINE.title} still fell by {100 * learning.late_validation_fall:.1f} %"
            yield f"{name} has not converged: {reason}"
        return
    if learning is None or learning.late_fall is None:
        yield f"whether {name} has converged is not known: its learning curve has too few points"
        return
    fall, error = learning.late_fall, learning.late_fall_error or 0.0
    if fall > max(rules.max_late_fall, 2.0 * error):
        reason = f"training {HEADLINE.title} fell by {100 * fall:.1f} % in the last quarter"
        yield f"{name} has not converged: {reason}"


def _overfitted(name: str, learning: Learning | None, rules: VerdictConfig) -> Iterator[str]:
    if learning is None or learning.lowest_validation_ne is None or learning.last_validation_ne is None:
        return
    lowest, last = learning.lowest_validation_ne, learning.last_validation_ne
    if last > lowest * (1.0 + rules.max_validation_rise):
        yield f"{name} overfits: validation {HEADLINE.title} rose from {lowest:.4f} to {last:.4f}"


def verdict_between(
    comparison: Comparison, task: str, arm: str, other: str, metric: str = HEADLINE.name
) -> Verdict | None:
    """Return the verdict on the gain of one arm over another in a metric of a task; None if there is no gain."""
    gain = comparison.arms[arm].tasks[task].gain(metric, other)
    if gain is None:
        return None
    few = few_users(comparison, task, metric)
    return judge(gain, (*_doubts_of(comparison, task, arm, other), *([few] if few else [])), comparison.replicates)


def segment_verdict(comparison: Comparison, task: str, arm: str, segment: Segment) -> Verdict | None:
    """Return the verdict on an arm's gain over the reference in one segment; None if there is no gain."""
    if segment.gain is None:
        return None
    few = _too_few(segment.rows, segment.positives, segment.users, comparison.rules)
    doubts = (*_doubts_of(comparison, task, arm, comparison.reference), *few)
    return judge(segment.gain, doubts, comparison.replicates)


def _doubts_of(comparison: Comparison, task: str, *arms: str) -> list[str]:
    return [doubt for arm in arms for doubt in comparison.arms[arm].tasks[task].doubts]


def few_users(comparison: Comparison, task: str, metric: str) -> str:
    """Return a doubt if a metric is based on too few users for any conclusion; empty otherwise."""
    users = comparison.arms[comparison.reference].tasks[task].metrics[metric].counts.get("users")
    least = comparison.rules.min_users
    return "" if users is None or users >= least else f"{metric} of {users:,} users, fewer than {least:,}"


def roi_doubt(results: Mapping[str, TaskResult], feature_bytes: float, rules: VerdictConfig) -> str:
    """Return why an arm has no return, if its gains or cost do not allow one; empty otherwise."""
    if any(result.verdict is not None and result.verdict.is_withheld for result in results.values()):
        return "gains are withheld"
    if 0.0 < feature_bytes < rules.min_feature_bytes:
        return f"a feature of {feature_bytes:.2g} B a row, less than {rules.min_feature_bytes:g} B, is divided by"
    return ""
