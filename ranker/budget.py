"""The size of a training, where the configuration leaves it to a rule.

The rules use rows, positives and dates, which a snapshot has without opening a file, and the tables' possible ids. They
use nothing that differs by arm or machine: every arm gets the same, on any number of ranks. A number in the
configuration is taken as it is.

- `batch_size`: the largest power of two that leaves `STEPS_AN_EPOCH` steps an epoch, between 64 and 4,096.
- `epochs`: as many as make `MIN_STEPS` steps, `MAX_EPOCHS` at most; a validation window decides which of them is the
  last (`ranker.validation`). Without a window one epoch, as overfitting would not be noticed.
- `validation_days`: the newest tenth of the training dates; see `validation_days`.
- `warmup_steps`: `warmup_share` of the steps.
- `max_rows` of an arm: see `ranker.id_feature.sid_rows`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from sidestack.infra.budget import batch_size, epochs_for, whole_lanes
from sidestack.infra.config import parse, plain
from sidestack.infra.learning_curve import point_every
from sidestack.infra.snapshot import Dataset
from sidestack.ranker.config import Dates, RankerConfig, TrainingConfig, without_newest

STEPS_AN_EPOCH = 512
"""With fewer, learning rates on a small log decay before its embeddings have moved: 98 steps learned nothing."""
LEAST_BATCH, LARGEST_BATCH = 64, 4096
"""With smaller batches a step's fixed cost dominates; larger ones would need other learning rates."""
MIN_STEPS, MAX_EPOCHS = 4096, 8
"""An upper bound for the search, which stops when the model no longer improves."""
MIN_DATES = 5
"""With fewer dates, even a window of one date would be too large a share."""
WINDOW_SHARE, LARGEST_WINDOW_SHARE = 0.1, 0.25
"""Shares of the training dates; `LARGEST_WINDOW_SHARE` also bounds the share of rows."""
WINDOW_POSITIVES = 100
"""Of each task without a parent. With fewer, the window's normalized entropy is mostly noise."""
LARGE_LOG = LARGEST_BATCH * MIN_STEPS
"""Beyond this number, more rows change no decision."""


class DecidedTraining(TrainingConfig):
    """The settings of a training with every rule decided, except those that follow from its number of steps."""

    epochs: PositiveInt
    """The number of epochs; with a validation window, the maximum."""
    batch_size: PositiveInt
    validation_days: NonNegativeInt


class DecidedConfig(RankerConfig):
    """A ranker's section with the settings of its training decided."""

    training: DecidedTraining


@dataclass(frozen=True)
class Day:
    """What a snapshot records about a training date.

    Attributes:
        rows: impressions. positives: by task without a parent, those with label 1.
    """

    date: date
    rows: int
    positives: Mapping[str, int]


def training_days(dataset: Dataset, *dates: Dates) -> list[Day]:
    """Return the days that have events, in order, from the snapshot alone.

    Args:
        dataset: the snapshot. dates: first and last of each range, in order.
    """
    events, labels = (
        [entry for span in dates for entry in dataset.partitions(table, *span)] for table in ("events", "labels")
    )
    facts = {entry.date: entry.facts for entry in labels}
    tasks = {name: f"positive_{name}" for name, task in dataset.spec.tasks.items() if task.given is None}
    return [
        Day(
            entry.date,
            entry.rows,
            {name: facts[entry.date][fact] for name, fact in tasks.items() if fact in facts[entry.date]},
        )
        for entry in events
    ]


def even_days(dates: Dates, rows: int) -> list[Day]:
    """Return the days of a planned log, with its rows spread evenly."""
    number = (dates[1] - dates[0]).days + 1
    bounds = [rows * day // number for day in range(number + 1)]
    return [Day(dates[0] + timedelta(days=n), bounds[n + 1] - bounds[n], {}) for n in range(number)]


def decide(config: RankerConfig, days: Sequence[Day]) -> DecidedConfig:
    """Return the configuration with everything decided that it leaves to a rule.

    Epochs that the configuration names are all trained; with `validation_days` set too, they are the maximum. A
    training with `steps_share` below 1 takes that share of the maximum epochs, by default without a window.

    Args:
        config: one arm's. days: the training dates.
    """
    training = config.training
    rows = sum(day.rows for day in days)
    by_rule = batch_size(rows, LEAST_BATCH, LARGEST_BATCH, STEPS_AN_EPOCH)
    batch = training.batch_size or whole_lanes(by_rule, training.lanes)
    epochs = training.epochs or epochs_for(rows // batch, MIN_STEPS, 1, MAX_EPOCHS)
    is_whole = training.steps_share == 1
    window = training.validation_days
    if window is None:
        window = validation_days(days) if training.epochs is None and epochs > 1 and is_whole else 0
    if training.epochs is None and not window and is_whole:
        epochs = 1
    decided = {"batch_size": batch, "epochs": epochs, "validation_days": window}
    values = {**plain(config), "training": {**plain(training), **decided}}
    return parse(DecidedConfig, values, "ranker")


def left_to_rule(config: RankerConfig) -> list[str]:
    """Return the names of the training's settings that the configuration leaves to a rule."""
    names = ("batch_size", "epochs", "validation_days", "warmup_steps", "log_every")
    return [name for name in names if getattr(config.training, name) is None]


def validation_days(days: Sequence[Day]) -> int:
    """Return how many calendar days the validation window takes from the end of the training dates.

    The newest tenth of the dates that have events, at least one; more if these have too few positives of some task
    without a parent. 0 (no window) if there are too few dates, or if a quarter of dates or rows would not suffice.
    """
    if len(days) < MIN_DATES:
        return 0
    rows = sum(day.rows for day in days)
    for number in range(max(round(WINDOW_SHARE * len(days)), 1), int(LARGEST_WINDOW_SHARE * len(days)) + 1):
        window = days[-number:]
        if sum(day.rows for day in window) > LARGEST_WINDOW_SHARE * rows:
            return 0
        if all(sum(day.positives.get(task, 0) for day in window) >= WINDOW_POSITIVES for task in days[0].positives):
            return (days[-1].date - window[0].date).days + 1
    return 0


def without_window(dates: Dates, training: DecidedTraining) -> tuple[Dates, Dates] | None:
    """Return the training dates before the validation window, and the window's dates; None: there is no window.

    Raises:
        ConfigError: no date would be left to train on.
    """
    days = training.validation_days
    return without_newest(dates, days, "ranker.training.validation_days") if days else None


def with_epochs(config: DecidedConfig, epochs: int) -> DecidedConfig:
    """Return the configuration with another number of epochs."""
    return config.model_copy(update={"training": config.training.model_copy(update={"epochs": epochs})})


def warmup_steps(training: TrainingConfig, num_steps: int) -> int:
    """Return the steps over which the learning rates rise in a training of `num_steps` steps."""
    return round(training.warmup_share * num_steps) if training.warmup_steps is None else training.warmup_steps


def decisions_message(config: RankerConfig, decided: DecidedConfig, days: Sequence[Day], hashed_rows: int) -> str:
    """Return a log line with what the rules decided before the training; empty: nothing.

    Args:
        config: as requested. decided: as resolved. days: the training dates.
        hashed_rows: rows of the arm's largest table in which SIDs are hashed; 0: there is none.
    """
    training = decided.training
    rows = sum(day.rows for day in days)
    most = " at most" if training.validation_days else ""
    words = {
        "batch_size": f"batch_size={training.batch_size} ({rows // training.batch_size:,} steps an epoch)",
        "epochs": f"epochs={training.epochs}{most}",
        "validation_days": f"validation_days={training.validation_days}",
    }
    decisions = [words[name] for name in left_to_rule(config) if name in words]
    if config.content.max_rows is None and hashed_rows:
        decisions.append(f"max_rows={hashed_rows}")
    return f"ranker: by rule, from {rows:,} rows of {len(days)} dates: {', '.join(decisions)}" if decisions else ""


def describe_decisions(config: RankerConfig, decided: DecidedConfig, days: Sequence[Day], steps: int) -> dict[str, Any]:
    """Return the decisions and their inputs, as JSON-ready data for the summary.

    Args:
        config: as requested. decided: as resolved. days: the training dates. steps: the number of steps taken.
    """
    training = decided.training
    tasks = days[0].positives if days else ()
    return {
        "by_rule": left_to_rule(config),
        "rows": sum(day.rows for day in days),
        "dates": len(days),
        "positives": {task: sum(day.positives.get(task, 0) for day in days) for task in tasks},
        "batch_size": training.batch_size,
        "epochs": training.epochs,
        "steps": steps,
        "warmup_steps": warmup_steps(training, steps),
        "log_every": point_every(steps, training.log_every),
        "validation_days": training.validation_days,
    }
