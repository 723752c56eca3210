"""Blocks on data and training: positive rates, and how long each arm was trained."""

from sidestack.pipelines.report.blocks import Block
from sidestack.pipelines.report.comparison import Comparison, Learning
from sidestack.pipelines.report.units import percent, scaled
from sidestack.ranker.metric_registry import HEADLINE


def rates_block(comparison: Comparison) -> Block:
    """Return each task's number of judged rows and share of positives, in training and held-out dates."""
    columns = ("training rows", "positive", "held-out rows", "positive", "users")
    rows = []
    for task, result in comparison.arms[comparison.reference].tasks.items():
        trained = comparison.trained_on.get(task)
        users = "" if result.users is None else f"{result.users:,}"
        of_training = _counts(trained.rows, trained.positives) if trained else ("", "")
        rows.append((task, *of_training, *_counts(result.num, result.positives), users))
    return Block("task", columns, tuple(rows))


def _counts(rows: int, positives: int) -> tuple[str, str]:
    return f"{rows:,}", f"{scaled(100 * positives / rows)} %" if rows else ""


def training_block(comparison: Comparison) -> Block:
    """Return how long each arm was trained, and its settings."""
    columns = ("steps", "epochs", "batch rows", "sparse rate", "dense rate")
    rows = []
    for name, arm in comparison.arms.items():
        one = arm.training
        values = (one.steps, one.epochs, one.batch_size, one.sparse_learning_rate, one.dense_learning_rate)
        rows.append((name, *map(_number, values)))
    return Block("training", columns, tuple(rows))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def settings_notes(comparison: Comparison) -> tuple[str, ...]:
    """Return notes on settings that a rule decided, and settings that differ between arms."""
    ruled: dict[tuple[str, ...], list[str]] = {}
    for name, arm in comparison.arms.items():
        if arm.training.by_rule:
            ruled.setdefault(arm.training.by_rule, []).append(name)
    by_rule = (f"decided by rule in {', '.join(names)}: {', '.join(settings)}" for settings, names in ruled.items())
    return (*by_rule, *(f"arms differ in {setting}" for setting in comparison.differs))


def learning_block(comparison: Comparison, task: str) -> Block:
    """Return each arm's learning on a task; no rows if no training has a curve."""
    title = HEADLINE.title
    columns = (f"training {title}", "fell in last quarter", f"lowest validation {title}", f"last validation {title}")
    found = {name: arm.tasks[task].learning for name, arm in comparison.arms.items()}
    rows = tuple((name, *_learning_cells(learning)) for name, learning in found.items() if learning)
    return Block(f"{task}, learning", columns, rows)


def _learning_cells(learning: Learning) -> tuple[str, ...]:
    return (
        HEADLINE.text(learning.train_ne),
        "" if learning.late_fall is None else percent(learning.late_fall),
        HEADLINE.text(learning.lowest_validation_ne),
        HEADLINE.text(learning.last_validation_ne),
    )
