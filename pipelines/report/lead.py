"""The result in words: the first sentences of the report, the tables and the terminal's output."""

from collections.abc import Iterator

from sidestack.pipelines.report.blocks import undefined_reason
from sidestack.pipelines.report.comparison import ArmResult, Comparison, TaskResult
from sidestack.pipelines.report.units import byte_size, percent, percent_interval, unbroken
from sidestack.ranker.metric_registry import HEADLINE


def lead(comparison: Comparison) -> list[str]:
    """Return one sentence per arm on its result, within what the verdicts allow."""
    return [
        f"{name}: {'; '.join(_results(comparison, arm))}; {unbroken(byte_size(arm.sid_table_bytes))} of SID tables."
        for name, arm in comparison.arms.items()
        if name != comparison.reference
    ]


def _results(comparison: Comparison, arm: ArmResult) -> Iterator[str]:
    """Return the result on each task in words; tasks with the same result are grouped."""
    tasks: dict[str, list[str]] = {}
    for task, result in arm.tasks.items():
        tasks.setdefault(_words(result, comparison.reference), []).append(task)
    for words, names in tasks.items():
        yield f"{_listed(names)} {words}"


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _words(result: TaskResult, reference: str) -> str:
    gain = result.gain(HEADLINE.name, reference)
    if gain is None or result.verdict is None:
        return f"undefined ({undefined_reason(result)})"
    if result.verdict.is_withheld:
        return result.verdict.words
    bounds = unbroken(percent_interval(gain.interval))
    if not result.verdict.is_shown:
        return f"{result.verdict.words} ({bounds})"
    return f"{result.verdict.words}, {HEADLINE.title} gain {unbroken(percent(gain.gain))} ({bounds})"


def roi_notes(comparison: Comparison) -> list[str]:
    """Return why arms have no return; arms with the same reason are grouped."""
    names: dict[str, list[str]] = {}
    for name, arm in comparison.arms.items():
        if arm.roi_withheld:
            names.setdefault(arm.roi_withheld, []).append(name)
    return [f"RoI of {_listed(of)} is withheld: {why}" for why, of in names.items()]
