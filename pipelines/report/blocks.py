"""What the tables say: small blocks of cells, a block a task and one of costs, and those that go into detail."""

from dataclasses import dataclass

from pipelines.report.comparison import ArmResult, Comparison, Gain, IdTable, TaskResult, holds_zero
from pipelines.report.units import byte_size, deviation, duration, percent, percent_interval, scaled, unbroken

NO_DIFFERENCE = "~"
"""Stands after a gain whose interval holds 0."""
EVERY_ARM = "every arm"
"""Stands for all arms where they share something."""
SEEDS = "± seeds"
"""Heads the standard deviation of a gain over trainings."""
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
    columns = ("NE", f"NE gain {_NO_MARK}", _interval_name(comparison), SEEDS, "AUC", "GAUC", "calibration")
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
    gains = _gain_cells(over_reference) if over_reference else (f"reference {_NO_MARK}", "", "")
    gauc = f"{result.gauc.gauc:.4f}" if result.gauc else ""
    return f"{result.ne:.4f}", *gains, f"{result.auc:.4f}", gauc, f"{result.calibration:.3f}"


def cost_block(comparison: Comparison) -> Block:
    """Tell what each arm costs."""
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
    """Tell how the embedding tables are used: those of SIDs arm by arm, all others, which arms share, once."""
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
        f"{table.collision_share:.1%}" if table.rows < table.possible_ids else "",
        f"{table.never_seen / looked_up:.2%}" if looked_up else "",
        byte_size(table.bytes),
    )


def return_block(comparison: Comparison) -> Block:
    """Tell what each arm gives for its cost, and what training it took."""
    columns = ("mean NE gain", "RoI, gain a KiB", "training", "ranks")
    rows = []
    for name, arm in comparison.arms.items():
        over = [task.over.get(comparison.reference) for task in arm.tasks.values()]
        gains = [gain.ne_gain for gain in over if gain is not None]
        cells = (
            percent(sum(gains) / len(gains)) if gains else "",
            "" if arm.roi is None else percent(arm.roi),
            "" if arm.train_seconds is None else duration(arm.train_seconds),
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
    return Block("pair", ("task", f"NE gain {_NO_MARK}", _interval_name(comparison), SEEDS), tuple(rows))


def ranking_block(comparison: Comparison, task: str) -> Block:
    """Tell how much better each arm orders rows: all of them (AUC), and those of one user (GAUC)."""
    estimated = (_interval_name(comparison), SEEDS)
    columns = (f"AUC gain {_NO_MARK}", *estimated, f"GAUC gain {_NO_MARK}", *estimated)
    rows = []
    for name, arm in comparison.arms.items():
        result, gauc = arm.tasks[task], arm.tasks[task].gauc
        if gauc is not None:
            in_auc = _estimate_cells(result.auc_gain, result.auc_gain_interval, result.auc_gain_seeds)
            in_gauc = _estimate_cells(gauc.gain, gauc.gain_interval, gauc.gain_seeds)
            itself = (f"reference {_NO_MARK}", "", "")
            rows.append((name, *itself, *itself) if name == comparison.reference else (name, *in_auc, *in_gauc))
    return Block(f"{task}, ranking", columns, tuple(rows), "" if rows else "undefined (no user has both labels)")


def trainings_block(comparison: Comparison, task: str) -> Block:
    """Tell the NE of each training of each arm."""
    columns = tuple(f"training {number}" for number in range(comparison.replicates))
    rows = ((name, *(f"{ne:.4f}" for ne in arm.tasks[task].ne_replicates)) for name, arm in comparison.arms.items())
    return Block(f"{task}, NE", columns, tuple(rows))


def segment_kinds(comparison: Comparison, task: str) -> tuple[str, ...]:
    """Name by what the rows of a task were cut into segments: `user`, `item`."""
    return tuple(comparison.arms[comparison.reference].tasks[task].segments)


def segment_blocks(comparison: Comparison) -> list[Block]:
    """Tell, for each task and kind of segment, each arm's gain on the rows with few and with many earlier clicks."""
    tasks = defined_tasks(comparison)
    return [_segment_block(comparison, task, kind) for task in tasks for kind in segment_kinds(comparison, task)]


def _segment_block(comparison: Comparison, task: str, kind: str) -> Block:
    segments = comparison.arms[comparison.reference].tasks[task].segments[kind]
    counts = ("rows", *(f"{one.rows:,}" for one in segments))
    rows = [counts]
    for name, arm in comparison.arms.items():
        if name != comparison.reference:
            rows.append((name, *(_segment_cell(one.gain) for one in arm.tasks[task].segments[kind])))
    columns = tuple(f"{one.name} clicks" for one in segments)
    return Block(f"{task}, by {kind}", columns, tuple(rows))


def _segment_cell(gain: Gain | None) -> str:
    if gain is None:
        return ""
    value, interval, _ = _gain_cells(gain)
    return f"{unbroken(value.strip())} ({unbroken(interval)})"


def detail_blocks(comparison: Comparison) -> tuple[Block, ...]:
    """Give the blocks beyond the terminal table: ordering, each training, segments."""
    tasks = defined_tasks(comparison)
    found = [ranking_block(comparison, task) for task in tasks]
    if comparison.replicates > 1:
        found += [trainings_block(comparison, task) for task in tasks]
    return (*found, *segment_blocks(comparison))


def defined_tasks(comparison: Comparison) -> tuple[str, ...]:
    """Name the tasks whose metrics are defined on these rows."""
    results = next(iter(comparison.arms.values())).tasks
    return tuple(task for task, result in results.items() if not undefined_reason(result))


def _gain_cells(gain: Gain) -> tuple[str, str, str]:
    return _estimate_cells(gain.ne_gain, gain.ne_gain_interval, gain.ne_gain_seeds)


def _estimate_cells(
    gain: float | None, interval: tuple[float, float] | None, seeds: float | None
) -> tuple[str, str, str]:
    """Tell a gain, its interval and its deviation over trainings; nothing where it is not defined."""
    if gain is None or interval is None:
        return "", "", ""
    mark = NO_DIFFERENCE if holds_zero(interval) else _NO_MARK
    return f"{percent(gain)} {mark}", percent_interval(interval), deviation(seeds)


def _interval_name(comparison: Comparison) -> str:
    return f"{100 * comparison.confidence:g} % interval"


def tasks_of(comparison: Comparison) -> tuple[str, ...]:
    """Name the tasks, in the order of the ranker."""
    return tuple(next(iter(comparison.arms.values())).tasks)
