"""What the rows of dates are made of: ingested files, lists that are kept, and what was known before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path

COUNTED: Mapping[str, tuple[str, ...]] = {
    "user": ("user_id",),
    "item": ("item_id",),
    "user_category": ("user_id", "category"),
}
"""What events are counted of, by the names of the features."""


@dataclass(frozen=True)
class State:
    """What is known at the beginning of a date.

    Attributes:
        day: the date. counts: by `COUNTED`, the file of totals. history: the file of histories' newest entries.
    """

    day: date
    counts: Mapping[str, Path]
    history: Path


@dataclass(frozen=True)
class LogInputs:
    """What the rows are made of.

    Attributes:
        events: ingested files. labels: by table, likewise. items, users: the files of numbers, oldest first.
        category: the items' categorical that events are counted by, as ingested; None: there is none.
        vocabularies: event categorical -> the file of its values. edges: column -> the borders of its buckets.
        end: when the log ends, exclusive. newest: the last date with events before it.
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
    """Return what events are counted of."""
    return {name: by for name, by in COUNTED.items() if inputs.category is not None or "category" not in by}


def count_columns(name: str, days: int) -> list[str]:
    """Return the names of the count features of one of `COUNTED`: all and recent counts, and the log odds of all.

    Log odds are log((positives + 1) / (others + 1)), 0 without events: a network on logarithms of counts alone learns
    this difference of two of them slowly.
    """
    counts = [f"{name}_{what}{window}" for window in ("", f"_{days}d") for what in ("events", "positives")]
    return [*counts, f"{name}_log_odds"]
