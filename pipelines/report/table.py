"""The comparison as tables: its blocks as text, Markdown and CSV, and the notes that tell how to read them."""

import csv
import io
from collections.abc import Sequence

from pipelines.report.blocks import (
    NO_DIFFERENCE,
    SEEDS,
    Block,
    cost_block,
    detail_blocks,
    quality_block,
    return_block,
    tasks_of,
)
from pipelines.report.comparison import ArmResult, Comparison

GAP = "  "


def blocks(comparison: Comparison) -> tuple[Block, ...]:
    """Give the blocks of the terminal table: one a task, then the costs."""
    quality = (quality_block(comparison, task) for task in tasks_of(comparison))
    return (*quality, cost_block(comparison))


def heading(comparison: Comparison) -> str:
    """Say on what the arms were compared."""
    first, last = comparison.held_out
    return f"held out {first} to {last} · {comparison.rows:,} impressions · {comparison.users:,} users"


def footnotes(comparison: Comparison) -> tuple[str, ...]:
    """Say how to read the table."""
    over_reference = (
        task.over.get(comparison.reference) for arm in comparison.arms.values() for task in arm.tasks.values()
    )
    marked = any(gain.holds_zero for gain in over_reference if gain is not None)
    notes = [f"NE gain is 1 - NE / NE({comparison.reference}); {_what_the_interval_holds(comparison)}"]
    if marked:
        notes.append(f"{NO_DIFFERENCE} the interval holds 0: no difference is shown")
    notes += _gauc_notes(comparison)
    if any(arm.flops_per_sample is not None for arm in comparison.arms.values()):
        notes.append("FLOPs: matrix products of the dense part, forward; lookups and attention are not counted")
    return (*notes, *comparison.warnings)


def _what_the_interval_holds(comparison: Comparison) -> str:
    if comparison.replicates == 1:
        return "one seed: the interval is over users, it does not hold the spread of training"
    return f"the interval is over users and {comparison.replicates} trainings, {SEEDS} its deviation over trainings"


def _gauc_notes(comparison: Comparison) -> list[str]:
    """Say for how many users GAUC, which weighs each by its rows, is defined."""
    results = comparison.arms[comparison.reference].tasks
    told = [f"{task} {one.gauc.users:,} users, {one.gauc.rows:,} rows" for task, one in results.items() if one.gauc]
    return [f"GAUC: AUC within users of both labels, by rows ({'; '.join(told)})"] if told else []


def as_text(comparison: Comparison) -> str:
    """Render the terminal table: aligned, no escape codes, under 110 columns for usual names."""
    shown = blocks(comparison)
    widths = _shared_widths(shown)
    lines = [heading(comparison), ""]
    for block in shown:
        lines += [*_block_lines(block, widths), ""]
    return "\n".join([*lines, *footnotes(comparison), ""])


def _shared_widths(shown: Sequence[Block]) -> list[int]:
    # Blocks have equally many columns and share their widths, so that the eye runs down one grid.
    table = [(block.title, *block.columns) for block in shown] + [row for block in shown for row in block.rows]
    return [max(len(cell) for cell in column) for column in zip(*table, strict=True)]


def _block_lines(block: Block, widths: Sequence[int]) -> list[str]:
    if block.undefined:
        return [f"{block.title:<{widths[0]}}{GAP}{block.undefined}"]
    header = line((block.title, *block.columns), widths)
    return [header, "─" * (sum(widths) + len(GAP) * (len(widths) - 1)), *(line(row, widths) for row in block.rows)]


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Give a line of a table for the terminal: the first cell to the left, all others to the right."""
    first, *rest = (
        f"{cell:>{width}}" if position else f"{cell:<{width}}"
        for position, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return GAP.join([first, *rest]).rstrip()


def as_markdown(comparison: Comparison) -> str:
    """Render every block as a Markdown table."""
    lines = [heading(comparison), ""]
    for block in (*blocks(comparison), return_block(comparison), *detail_blocks(comparison)):
        if block.undefined:
            lines += [f"{block.title}: {block.undefined}", ""]
            continue
        lines.append("| " + " | ".join(_stripped((block.title, *block.columns))) + " |")
        lines.append("|---" + "|---:" * len(block.columns) + "|")
        lines += ["| " + " | ".join(_stripped(row)) + " |" for row in block.rows]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in footnotes(comparison)), ""])


def _stripped(cells: Sequence[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def as_csv(comparison: Comparison) -> str:
    """Render unrounded numbers, a row for each arm and task; what is undefined is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measures = (
        "num", "positives", "ne", "ne_gain", "auc", "calibration", "ne_gain_seeds", "auc_gain", "auc_gain_seeds",
    )  # fmt: skip
    costs = [name for name in ArmResult.model_fields if name != "tasks"]
    bounds = [f"{gain}_{bound}" for gain in ("ne_gain", "auc_gain", "gauc_gain") for bound in ("low", "high")]
    writer.writerow(["arm", "task", *measures, "gauc", "gauc_gain", *bounds, *costs])
    for name, arm in comparison.arms.items():
        for task, result in arm.tasks.items():
            quality = [getattr(result, measure) for measure in measures]
            quality += [result.gauc.gauc, result.gauc.gain] if result.gauc else [None, None]
            quality += result.ne_gain_interval or (None, None)
            quality += result.auc_gain_interval or (None, None)
            quality += (result.gauc and result.gauc.gain_interval) or (None, None)
            writer.writerow([name, task, *quality, *(getattr(arm, cost) for cost in costs)])
    return text.getvalue()
