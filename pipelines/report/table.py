"""The comparison as tables: blocks as text, Markdown and CSV, and notes on how to read them."""

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from textwrap import wrap

from sidestack.pipelines.report.blocks import (
    NO_DIFFERENCE,
    SEEDS,
    WITHHELD,
    WITHHELD_MARK,
    Block,
    cost_block,
    defined_tasks,
    detail_blocks,
    quality_block,
    return_block,
)
from sidestack.pipelines.report.blocks_trained import learning_block, rates_block, settings_notes, training_block
from sidestack.pipelines.report.comparison import ArmResult, Comparison, TaskResult, Training
from sidestack.pipelines.report.gains import pooled_arms
from sidestack.pipelines.report.lead import lead, roi_notes
from sidestack.pipelines.report.verdict import few_users
from sidestack.ranker.intervals import student_reach
from sidestack.ranker.metric_registry import HEADLINE, Metric, all_metrics

GAP = "  "
_LINE = 110
"""Width of prose in the terminal, in characters."""


def blocks(comparison: Comparison) -> tuple[Block, ...]:
    """Return the blocks of the results: one per task, then the costs."""
    quality = (quality_block(comparison, task) for task in comparison.tasks)
    return (*quality, cost_block(comparison))


def trained_blocks(comparison: Comparison) -> tuple[Block, ...]:
    """Return the blocks before the results: positive rates, and the arms' training."""
    return rates_block(comparison), training_block(comparison)


def learning_blocks(comparison: Comparison) -> tuple[Block, ...]:
    """Return the learning blocks of each task that has a curve."""
    found = (learning_block(comparison, task) for task in defined_tasks(comparison))
    return tuple(block for block in found if block.rows)


def heading(comparison: Comparison) -> str:
    """Return the data on which the arms were compared, in words."""
    first, last = comparison.held_out
    return f"held out {first} to {last} · {comparison.rows:,} impressions · {comparison.users:,} users"


def footnotes(comparison: Comparison) -> tuple[str, ...]:
    """Return notes on how to read the table."""
    verdicts = [task.verdict for arm in comparison.arms.values() for task in arm.tasks.values() if task.verdict]
    few = any(few_users(comparison, task, metric) for task in comparison.tasks for metric in all_metrics())
    notes = [f"{HEADLINE.gain_rule(comparison.reference)}; {_interval_note(comparison)}"]
    pooled = pooled_arms(comparison.arms, comparison.replicates)
    if comparison.replicates > 1 and len(pooled) > 1:
        notes.append(_few_trainings_note(comparison.confidence, len(pooled), comparison.replicates))
    if any(not verdict.is_shown and not verdict.is_withheld for verdict in verdicts):
        notes.append(f"{NO_DIFFERENCE} the interval holds 0: no difference is shown")
    if any(verdict.is_withheld for verdict in verdicts):
        notes.append(f"{WITHHELD}: for the reasons above; the report has what was measured, marked {WITHHELD_MARK}")
    if few:
        notes.append(f"{WITHHELD_MARK} stands on fewer than {comparison.rules.min_users:,} users: not a result")
    notes += roi_notes(comparison)
    notes += [_metric_note(comparison, metric) for metric in all_metrics().values() if metric.note]
    if any(arm.flops_per_sample is not None for arm in comparison.arms.values()):
        notes.append("FLOPs: matrix products of the dense part, forward; lookups and attention are not counted")
    return (*notes, *comparison.warnings)


def _closing_lines(comparison: Comparison) -> tuple[str, ...]:
    """Return the lines below the tables: settings, and how to read the tables."""
    return (*settings_notes(comparison), *footnotes(comparison))


def _interval_note(comparison: Comparison) -> str:
    if comparison.replicates == 1:
        return "one training: the interval is over users, it does not hold the spread of training (run.replicates)"
    return f"the interval is over users and {comparison.replicates} trainings, {SEEDS} its deviation over trainings"


def _few_trainings_note(confidence: float, arms: int, replicates: int) -> str:
    """Return a note on the interval's width with few trainings, and with one more."""
    now, then = (
        student_reach(confidence, number, (arms - 1) * (number - 1)) for number in (replicates, replicates + 1)
    )
    return (
        f"the deviation over trainings is pooled over {arms} arms: with {replicates} trainings an interval extends"
        f" {now:.1f} deviations to each side, with {replicates + 1} {then:.1f} (Student's t); to resolve small gains,"
        " raise run.replicates: finished trainings are kept"
    )


def _metric_note(comparison: Comparison, metric: Metric) -> str:
    """Return a note on a metric, and on the number of users or rows it is based on."""
    results = comparison.arms[comparison.reference].tasks
    counts = {task: result.metrics[metric.name].counts for task, result in results.items()}
    counted = [
        f"{task} " + ", ".join(f"{number:,} {what}" for what, number in found.items())
        for task, found in counts.items()
        if found
    ]
    return f"{metric.title}: {metric.note}" + (f" ({'; '.join(counted)})" if counted else "")


def as_text(comparison: Comparison) -> str:
    """Render the terminal table: aligned, no escape codes, under 110 columns for usual names."""
    shown = (*trained_blocks(comparison), *blocks(comparison))
    widths = _shared_widths(shown)
    lines = [heading(comparison), "", *_wrapped(lead(comparison)), ""]
    for block in shown:
        lines += [*_block_lines(block, widths), ""]
    return "\n".join([*lines, *_wrapped(_closing_lines(comparison)), ""])


def _wrapped(sentences: Iterable[str]) -> list[str]:
    """Return sentences wrapped for the terminal."""
    lines = (line for sentence in sentences for line in wrap(sentence, _LINE, subsequent_indent=GAP))
    return [line.replace("\u00a0", " ") for line in lines]


def _shared_widths(shown: Sequence[Block]) -> list[int]:
    # Blocks share column widths, so that they align in one grid.
    table = [(block.title, *block.columns) for block in shown] + [row for block in shown for row in block.rows]
    return [max(len(cell) for cell in column) for column in zip_longest(*table, fillvalue="")]


def _block_lines(block: Block, widths: Sequence[int]) -> list[str]:
    if block.undefined:
        return [f"{block.title:<{widths[0]}}{GAP}{block.undefined}"]
    widths = widths[: 1 + len(block.columns)]
    header = line((block.title, *block.columns), widths)
    return [header, "─" * (sum(widths) + len(GAP) * (len(widths) - 1)), *(line(row, widths) for row in block.rows)]


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return a table line for the terminal: the first cell left-aligned, all others right-aligned."""
    first, *rest = (
        f"{cell:>{width}}" if position else f"{cell:<{width}}"
        for position, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return GAP.join([first, *rest]).rstrip()


def as_markdown(comparison: Comparison) -> str:
    """Render every block as a Markdown table."""
    lines = [heading(comparison), "", *(f"- {sentence}" for sentence in lead(comparison)), ""]
    shown = (*trained_blocks(comparison), *blocks(comparison), return_block(comparison))
    for block in (*shown, *learning_blocks(comparison), *detail_blocks(comparison)):
        if block.undefined:
            lines += [f"{block.title}: {block.undefined}", ""]
            continue
        lines.append("| " + " | ".join(_stripped((block.title, *block.columns))) + " |")
        lines.append("|---" + "|---:" * len(block.columns) + "|")
        lines += ["| " + " | ".join(_stripped(row)) + " |" for row in block.rows]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in (*_closing_lines(comparison), mark_note(comparison))), ""])


def mark_note(comparison: Comparison) -> str:
    """Return a note on the mark of gains in the details."""
    rules = comparison.rules
    few = f"fewer than {rules.min_positives:,} positives or negatives, or {rules.min_users:,} users"
    return f"{WITHHELD_MARK} nothing is to be concluded: the verdict is withheld, or the gain is of {few}"


def _stripped(cells: Sequence[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def as_csv(comparison: Comparison) -> str:
    """Render unrounded numbers, a row for each arm and task; undefined values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    costs = [name for name in ArmResult.model_fields if name not in ("tasks", "training")]
    trained = list(Training.model_fields)
    header = ["arm", "task", "num", "positives", "users", "verdict", "reasons"]
    writer.writerow([*header, *_metric_columns(), *trained, *costs])
    for name, arm in comparison.arms.items():
        for task, result in arm.tasks.items():
            quality = [
                cell for metric in all_metrics().values() for cell in _metric_numbers(comparison, result, metric)
            ]
            verdict = (result.verdict.kind, "; ".join(result.verdict.reasons)) if result.verdict else ("", "")
            given = [name, task, result.num, result.positives, result.users, *verdict]
            training = (getattr(arm.training, setting) for setting in trained)
            writer.writerow([*given, *quality, *training, *(getattr(arm, cost) for cost in costs)])
    return text.getvalue()


def _metric_columns() -> list[str]:
    columns = []
    for name, metric in all_metrics().items():
        parts = ("", "_gain", "_gain_low", "_gain_high", "_gain_seeds") if metric.better else ("",)
        columns += [f"{name}{part}" for part in parts]
    return columns


def _metric_numbers(comparison: Comparison, result: TaskResult, metric: Metric) -> tuple[float | None, ...]:
    value, gain = result.metrics[metric.name].value, result.gain(metric.name, comparison.reference)
    if not metric.better:
        return (value,)
    return (value, gain.gain, *gain.interval, gain.seeds) if gain else (value, None, None, None, None)
