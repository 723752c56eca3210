"""The content of the tables: blocks of cells for each task and for costs, and blocks of details."""

from dataclasses import dataclass

from sidestack.pipelines.report.comparison import ArmResult, Comparison, Gain, IdTable, Segment, TaskResult, Verdict
from sidestack.pipelines.report.units import byte_size, deviation, duration, percent, percent_interval, scaled, unbroken
from sidestack.pipelines.report.verdict import few_users, segment_verdict, verdict_between
from sidestack.ranker.metric_registry import HEADLINE, Metric, all_metrics, compared_metrics

NO_DIFFERENCE = "~"
"""Mark after a gain whose interval contains 0."""
WITHHELD_MARK = "?"
"""Mark after a number from which nothing can be concluded."""
WITHHELD = "withheld"
"""Shown instead of a gain whose verdict is withheld."""
EVERY_ARM = "every arm"
"""Row name for all arms where they share something."""
SEEDS = "± seeds"
"""Heading of the standard deviation of a gain over trainings."""
_NO_MARK = " " * len(NO_DIFFERENCE)


@dataclass(frozen=True)
class Block:
    """One small table.

    Attributes:
        title: the subject; heading of the column of arms.
        columns: names of the further columns.
        rows: for each arm, its name and a cell for each column.
        undefined: the reason why there are no rows; empty otherwise.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    undefined: str = ""


def quality_block(comparison: Comparison, task: str) -> Block:
    """Return each arm's quality on one task: the headline metric with its gain, then every other metric."""
    first, *others = (metric.title for metric in _headline_first())
    columns = (first, *_gain_columns(comparison, first), *others)
    results = {name: arm.tasks[task] for name, arm in comparison.arms.items()}
    why = undefined_reason(next(iter(results.values())))
    if why:
        return Block(task, columns, (), f"undefined ({why})")
    return Block(task, columns, tuple((name, *_quality_cells(comparison, task, name)) for name in results))


def undefined_reason(result: TaskResult) -> str:
    """Return why a task's metrics are not defined; empty if they are."""
    if result.num == 0:
        return "no labelled rows"
    if result.positives == 0:
        return "no positives"
    return "no negatives" if result.positives == result.num else ""


def _quality_cells(comparison: Comparison, task: str, name: str) -> tuple[str, ...]:
    result = comparison.arms[name].tasks[task]
    first, *others = (_value_cell(comparison, task, name, metric) for metric in _headline_first())
    if result.verdict is not None and result.verdict.is_withheld:
        return first, f"{WITHHELD} {_NO_MARK}", "", "", *others
    return first, *_arm_gain_cells(comparison, task, name, HEADLINE.name), *others


def _value_cell(comparison: Comparison, task: str, name: str, metric: Metric) -> str:
    """Return a metric's value, marked if it is based on too few users."""
    text = metric.text(comparison.arms[name].tasks[task].metrics[metric.name].value)
    return f"{text} {WITHHELD_MARK}" if text and few_users(comparison, task, metric.name) else text


def _headline_first() -> tuple[Metric, ...]:
    return HEADLINE, *(metric for metric in all_metrics().values() if metric != HEADLINE)


def cost_block(comparison: Comparison) -> Block:
    """Return each arm's costs."""
    columns = ("SID tables", "all tables", "feature a row", "parameters", "FLOPs a row", "samples/s", "peak memory")
    rows = tuple((name, *_cost_cells(arm)) for name, arm in comparison.arms.items())
    return Block("cost", columns, rows)


def _cost_cells(arm: ArmResult) -> tuple[str, ...]:
    return (
        byte_size(arm.sid_table_bytes),
        byte_size(arm.table_bytes),
        byte_size(arm.feature_bytes_per_row),
        "" if arm.parameters is None else scaled(arm.parameters),
        "" if arm.flops_per_sample is None else scaled(arm.flops_per_sample),
        scaled(arm.samples_per_second),
        byte_size(arm.peak_memory_bytes),
    )


def tables_block(comparison: Comparison, *, only_sids: bool = False) -> Block:
    """Return the use of embedding tables: SID tables for each arm, all others once, as arms share them."""
    columns = ("table", "possible ids", "ids seen", "rows", "share a row", "never seen", "bytes")
    rows = [
        (name if table.is_sid else EVERY_ARM, *_table_cells(table))
        for name, arm in comparison.arms.items()
        for table in arm.tables
        if table.is_sid or (name == comparison.reference and not only_sids)
    ]
    return Block("arm", columns, tuple(rows))


def _table_cells(table: IdTable) -> tuple[str, ...]:
    looked_up = table.held_out_ids
    return (
        table.table.removeprefix("t_"),
        f"{table.possible_ids:,}",
        f"{table.distinct_ids:,}",
        f"{table.rows:,}",
        f"{table.collision_share:.1%}" if table.rows < table.possible_ids or table.collision_share else "",
        f"{table.never_seen / looked_up:.2%}" if looked_up else "",
        byte_size(table.bytes),
    )


def return_block(comparison: Comparison) -> Block:
    """Return each arm's return on cost, and its training's cost."""
    columns = (f"mean {HEADLINE.title} gain", "RoI, gain a KiB", "training", "ranks")
    rows = []
    for name, arm in comparison.arms.items():
        cells = (
            *_return_cells(comparison, arm),
            "" if arm.train_seconds is None else duration(arm.train_seconds),
            "" if arm.world_size is None else f"{arm.world_size}",
        )
        rows.append((name, *cells))
    return Block("return", columns, tuple(rows))


def _return_cells(comparison: Comparison, arm: ArmResult) -> tuple[str, str]:
    """Return the mean gain over tasks and the return, if verdicts allow; marked if no difference is shown."""
    verdicts = [task.verdict for task in arm.tasks.values() if task.verdict is not None]
    if any(verdict.is_withheld for verdict in verdicts):
        return WITHHELD, WITHHELD if arm.roi_withheld else ""
    mark = "" if any(verdict.is_shown for verdict in verdicts) else f" {NO_DIFFERENCE}"
    over = [task.gain(HEADLINE.name, comparison.reference) for task in arm.tasks.values()]
    gains = [gain.gain for gain in over if gain is not None]
    roi = "" if arm.roi is None else f"{percent(arm.roi)}{mark}"
    return f"{percent(sum(gains) / len(gains))}{mark}" if gains else "", WITHHELD if arm.roi_withheld else roi


def between_block(comparison: Comparison) -> Block:
    """Return the gain of each arm over each earlier non-reference arm; no rows without such pairs."""
    names = [name for name in comparison.arms if name != comparison.reference]
    rows = []
    for position, better in enumerate(names):
        for other in names[:position]:
            for task, result in comparison.arms[better].tasks.items():
                gain, verdict = result.gain(HEADLINE.name, other), verdict_between(comparison, task, better, other)
                if gain is not None and verdict is not None:
                    rows.append((f"{better} over {other}", task, *_gain_cells(gain, verdict)))
    return Block("pair", ("task", *_gain_columns(comparison, HEADLINE.title)), tuple(rows))


def withheld_block(comparison: Comparison) -> Block:
    """Return the gains over the reference whose verdict is withheld, each marked; no rows without one."""
    rows = []
    for name, arm in comparison.arms.items():
        for task, result in arm.tasks.items():
            gain = result.gain(HEADLINE.name, comparison.reference)
            if gain is not None and result.verdict is not None and result.verdict.is_withheld:
                rows.append((name, task, *_gain_cells(gain, result.verdict)))
    return Block(WITHHELD, ("task", *_gain_columns(comparison, HEADLINE.title)), tuple(rows))


def gains_block(comparison: Comparison, task: str) -> Block:
    """Return each arm's gain in the metrics other than the headline, such as ranking metrics."""
    metrics = [metric for metric in compared_metrics() if metric != HEADLINE]
    columns = [column for metric in metrics for column in _gain_columns(comparison, metric.title)]
    rows = []
    for name in comparison.arms:
        cells = (_arm_gain_cells(comparison, task, name, metric.name) for metric in metrics)
        rows.append((name, *(cell for of_metric in cells for cell in of_metric)))
    return Block(f"{task}, further gains", tuple(columns), tuple(rows))


def trainings_block(comparison: Comparison, task: str) -> Block:
    """Return the headline metric of each training of each arm."""
    columns = tuple(f"training {number}" for number in range(comparison.replicates))
    found = {name: arm.tasks[task].metrics[HEADLINE.name].replicates for name, arm in comparison.arms.items()}
    rows = tuple((name, *map(HEADLINE.text, values)) for name, values in found.items())
    return Block(f"{task}, {HEADLINE.title}", columns, rows)


def segment_kinds(comparison: Comparison, task: str) -> tuple[str, ...]:
    """Return the kinds of segments of a task's rows: `user`, `item`."""
    return tuple(comparison.arms[comparison.reference].tasks[task].segments)


def segment_blocks(comparison: Comparison) -> list[Block]:
    """Return, for each task and kind of segment, each arm's gain by number of earlier positives."""
    tasks = defined_tasks(comparison)
    return [_segment_block(comparison, task, kind) for task in tasks for kind in segment_kinds(comparison, task)]


def _segment_block(comparison: Comparison, task: str, kind: str) -> Block:
    segments = comparison.arms[comparison.reference].tasks[task].segments[kind]
    counts = ("rows", *(f"{one.rows:,}" for one in segments))
    rows = [counts]
    for name, arm in comparison.arms.items():
        if name != comparison.reference:
            cells = (_segment_cell(comparison, task, name, one) for one in arm.tasks[task].segments[kind])
            rows.append((name, *cells))
    columns = tuple(f"{comparison.earlier_task} {one.name}" for one in segments)
    return Block(f"{task}, by {kind}", columns, tuple(rows))


def _segment_cell(comparison: Comparison, task: str, name: str, segment: Segment) -> str:
    verdict = segment_verdict(comparison, task, name, segment)
    if segment.gain is None or verdict is None:
        return ""
    value, interval, _ = _gain_cells(segment.gain, verdict)
    return f"{unbroken(value.strip())} ({unbroken(interval)})"


def detail_blocks(comparison: Comparison) -> tuple[Block, ...]:
    """Return the blocks beyond the terminal table: withheld and further gains, each training, segments."""
    tasks = defined_tasks(comparison)
    found = [block for block in (withheld_block(comparison),) if block.rows]
    found += [gains_block(comparison, task) for task in tasks]
    if comparison.replicates > 1:
        found += [trainings_block(comparison, task) for task in tasks]
    return (*found, *segment_blocks(comparison))


def defined_tasks(comparison: Comparison) -> tuple[str, ...]:
    """Return the tasks whose metrics are defined on these rows."""
    results = next(iter(comparison.arms.values())).tasks
    return tuple(task for task, result in results.items() if not undefined_reason(result))


def _arm_gain_cells(comparison: Comparison, task: str, name: str, metric: str) -> tuple[str, str, str]:
    """Return the cells of an arm's gain over the reference."""
    if name == comparison.reference:
        return f"reference {_NO_MARK}", "", ""
    gain = comparison.arms[name].tasks[task].gain(metric, comparison.reference)
    verdict = verdict_between(comparison, task, name, comparison.reference, metric)
    return _gain_cells(gain, verdict) if gain is not None and verdict is not None else ("", "", "")


def _gain_cells(gain: Gain, verdict: Verdict) -> tuple[str, str, str]:
    """Return the cells of a gain: value, interval, and standard deviation over trainings."""
    return f"{percent(gain.gain)} {mark_of(verdict)}", percent_interval(gain.interval), deviation(gain.seeds)


def mark_of(verdict: Verdict) -> str:
    """Return the fixed-width mark after a gain's number."""
    if verdict.is_withheld:
        return WITHHELD_MARK
    return _NO_MARK if verdict.is_shown else NO_DIFFERENCE


def _gain_columns(comparison: Comparison, title: str) -> tuple[str, str, str]:
    """Return the headings of a gain's cells, for a metric's title."""
    return f"{title} gain {_NO_MARK}", _interval_name(comparison), SEEDS


def _interval_name(comparison: Comparison) -> str:
    return f"{100 * comparison.confidence:g} % interval"
