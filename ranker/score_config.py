"""Section `score`: which dates are scored, and how many rows are committed at a time."""

import itertools
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, PositiveInt, model_validator

from sidestack.infra.config import Config
from sidestack.ranker.config import Dates


def _as_ranges(value: Any) -> Any:
    is_range = isinstance(value, list | tuple) and len(value) == 2 and not isinstance(value[0], list | tuple)
    return [value] if is_range else value


class ScoreConfig(Config):
    """Section `score`."""

    dates: Annotated[tuple[Dates, ...], BeforeValidator(_as_ranges)] = ()
    """First and last date to score, or several such ranges in order; by default all dates of the snapshot."""
    part_rows: PositiveInt = 1_000_000
    """A part ends with the date on which it reaches this many rows. A resumed run repeats at most one part."""

    @model_validator(mode="after")
    def _check_order(self) -> "ScoreConfig":
        is_apart = all(before[1] < after[0] for before, after in itertools.pairwise(self.dates))
        if not is_apart or any(first > last for first, last in self.dates):
            raise ValueError(f"dates: {format_ranges(self.dates)}: must be in order, and apart")
        return self


def format_ranges(dates: Iterable[Dates]) -> str:
    """Return ranges of dates as text."""
    return ", ".join(f"{first} to {last}" for first, last in dates)
