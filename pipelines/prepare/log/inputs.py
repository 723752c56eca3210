"""Inputs of the rows of dates: ingested files, stored lists, and the state before the dates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path

COUNTED: Mapping[str, tuple[str, ...]] = {
    "user": ("user_id",),
    "item": ("item_id",),
    "user_category": ("user_id", "category"),
}
"""Keys of the count features, by feature name."""


@dataclass(frozen=True)
class State:
    """State at the beginning of a date.

    Attributes:
        day: the date. counts: by `COUNTED`, the file of totals. history: the file of histories' newest entries.
    """

    day: date
    counts: Mapping[str, Path]
    history: Path


@dataclass(frozen=True)
class LogInputs:
    """Files from which rows are made.

    Attributes:
        events: ingested files. labels: ingested files by table. items, users: the files of ids, oldest first.
        category: the items' categorical that events are counted by, as ingested; None if there is none.
        vocabularies: event categorical -> the file of its values. edges: column -> the edges of its buckets.
        end: the log's end, exclusive. newest: the last date with events before it.
        since: rows before this date are not read.
    """

    events: Sequence[Path]
    labels: Mapping[str, Sequence[Path]]
    items: Sequence[Path]
    users: Sequence[Path]
    category: str | None
    vocabularies: Mapping[str, Path]
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    end: datetime = datetime.max
    newest: date = date.max
    since: date = date.min


def counted(inputs: LogInputs) -> dict[str, tuple[str, ...]]:
    """Return the keys by which events are counted."""
    return {name: by for name, by in COUNTED.items() if inputs.category is not None or "category" not in by}


def count_columns(name: str, days: int) -> list[str]:
    """Return the names of the count features of one of `COUNTED`: all-time and recent counts, and all-time log odds.

    Log odds are log((positives + 1) / (others + 1)), 0 without events: a network that only gets logarithms of counts is
    slow to learn their difference.
    """
    counts = [f"{name}_{what}{window}" for window in ("", f"_{days}d") for what in ("events", "positives")]
    return [*counts, f"{name}_log_odds"]
