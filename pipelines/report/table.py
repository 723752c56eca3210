"""The comparison as tables: a block a task and one of costs, rendered as text, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.report.comparison import ArmResult, Comparison, Gain, TaskResult
from pipelines.report.units import byte_size, duration, percent, percent_interval, scaled

NO_DIFFERENCE = "~"
"""Stands after a gain whose interval holds 0."""
GAP = "  "
_NO_MARK = " " * len(NO_DIFFERENCE)


@dataclass(frozen=True)
class Block:
    """One small table.

    Attributes:
        title: what it is about; heads the column of arms.
        columns: names of the further columns.
        rows: for each arm its name and a cell for each column.
        undefined: why there is nothing to show, in place of rows; empty otherwise.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    undefined: str = ""


def quality_block(comparison: Comparison, task: str) -> Block:
    """Tell how well each arm predicts one task."""
    columns = ("NE", f"NE gain {_NO_MARK}", _interval_name(comparison), "AUC", "calibration")
    results = {name: arm.tasks[task] for name, arm in comparison.arms.items()}
    why = undefined_reason(next(iter(results.values())))
    if why:
        return Block(task, columns, (), f"undefined ({why})")
    rows = tuple(
        (name, *_quality_cells(result, result.over.get(comparison.reference))) for name, result in results.items()
    )
    return Block(task, columns, rows)


def undefined_reason(result: TaskResult) -> str:
    """Say why a task's metrics are not defined; empty when they are."""
    if result.num == 0:
        return "no labelled rows"
    if result.positives == 0:
        return "no positives"
    return "no negatives" if result.positives == result.num else ""


def _quality_cells(result: TaskResult, over_reference: Gain | None) -> tuple[str, ...]:
    assert result.ne is not None and result.auc is not None and result.calibration is not None
    gain, interval = _gain_cells(over_reference) if over_reference else (f"reference {_NO_MARK}", "")
    return f"{result.ne:.4f}", gain, interval, f"{result.auc:.4f}", f"{result.calibration:.3f}"


def cost_block(comparison: Comparison) -> Block:
    """Tell what each arm costs."""
    columns = ("SID tables", "all tables", "feature a row", "samples/s", "peak memory")
    rows = tuple((name, *_cost_cells(arm)) for name, arm in comparison.arms.items())
    return Block("cost", columns, rows)


def _cost_cells(arm: ArmResult) -> tuple[str, ...]:
    return (
        byte_size(arm.sid_table_bytes),
        byte_size(arm.table_bytes),
        byte_size(arm.feature_bytes_per_row),
        scaled(arm.samples_per_second),
        byte_size(arm.peak_memory_bytes),
    )


def return_block(comparison: Comparison) -> Block:
    """Tell what each arm gives for its cost, and what training it took."""
    columns = ("mean NE gain", "RoI, gain a KiB", "training", "parameters", "ranks")
    rows = []
    for name, arm in comparison.arms.items():
        over = [task.over.get(comparison.reference) for task in arm.tasks.values()]
        gains = [gain.ne_gain for gain in over if gain is not None]
        cells = (
            percent(sum(gains) / len(gains)) if gains else "",
            "" if arm.roi is None else percent(arm.roi),
            "" if arm.train_seconds is None else duration(arm.train_seconds),
            "" if arm.parameters is None else scaled(arm.parameters),
            "" if arm.world_size is None else f"{arm.world_size}",
        )
        rows.append((name, *cells))
    return Block("return", columns, tuple(rows))


def between_block(comparison: Comparison) -> Block:
    """Tell the gain of each arm over each earlier one that is not the reference; no rows without such pairs."""
    names = [name for name in comparison.arms if name != comparison.reference]
    rows = []
    for position, better in enumerate(names):
        for other in names[:position]:
            for task, result in comparison.arms[better].tasks.items():
                if other in result.over:
                    rows.append((f"{better} over {other}", task, *_gain_cells(result.over[other])))
    return Block("pair", ("task", f"NE gain {_NO_MARK}", _interval_name(comparison)), tuple(rows))


def _gain_cells(gain: Gain) -> tuple[str, str]:
    mark = NO_DIFFERENCE if gain.holds_zero else _NO_MARK
    return f"{percent(gain.ne_gain)} {mark}", percent_interval(gain.ne_gain_interval)


def _interval_name(comparison: Comparison) -> str:
    return f"{100 * comparison.confidence:g} % interval"


def tasks_of(comparison: Comparison) -> tuple[str, ...]:
    """Name the tasks, in the order of the ranker."""
    return tuple(next(iter(comparison.arms.values())).tasks)


def blocks(comparison: Comparison) -> tuple[Block, ...]:
    """Give the blocks of the terminal table: one a task, then the costs."""
    quality = (quality_block(comparison, task) for task in tasks_of(comparison))
    return (*quality, cost_block(comparison))


def heading(comparison: Comparison) -> str:
    """Say on what the arms were compared."""
    first, last = comparison.test
    return f"held out {first} to {last} · {comparison.rows:,} impressions · {comparison.users:,} users"


def footnotes(comparison: Comparison) -> tuple[str, ...]:
    """Say how to read the table."""
    over_reference = (
        task.over.get(comparison.reference) for arm in comparison.arms.values() for task in arm.tasks.values()
    )
    marked = any(gain.holds_zero for gain in over_reference if gain is not None)
    notes = [f"NE gain is 1 - NE / NE({comparison.reference}); its interval is over users, not over training seeds"]
    if marked:
        notes.append(f"{NO_DIFFERENCE} the interval holds 0: no difference is shown")
    return (*notes, *comparison.warnings)


def as_text(comparison: Comparison) -> str:
    """Render the terminal table: aligned, no escape codes, under 90 columns for usual names."""
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
    header = _line((block.title, *block.columns), widths)
    return [header, "─" * (sum(widths) + len(GAP) * (len(widths) - 1)), *(_line(row, widths) for row in block.rows)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        f"{cell:>{width}}" if position else f"{cell:<{width}}"
        for position, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return GAP.join([first, *rest]).rstrip()


def as_markdown(comparison: Comparison) -> str:
    """Render every block as a Markdown table."""
    lines = [heading(comparison), ""]
    for block in (*blocks(comparison), return_block(comparison)):
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
    measures = ("num", "positives", "ne", "ne_gain", "auc", "calibration")
    costs = [name for name in ArmResult.model_fields if name != "tasks"]
    writer.writerow(["arm", "task", *measures, "ne_gain_low", "ne_gain_high", *costs])
    for name, arm in comparison.arms.items():
        for task, result in arm.tasks.items():
            quality = [getattr(result, measure) for measure in measures]
            bounds = result.ne_gain_interval or (None, None)
            writer.writerow([name, task, *quality, *bounds, *(getattr(arm, cost) for cost in costs)])
    return text.getvalue()
