"""Which dates are new in a cycle, and which earlier dates they are compared with."""

from dataclasses import dataclass
from datetime import date

from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.snapshot import Dataset

EARLIER_DATES = 28
"""Maximum number of dates that new ones are compared with: whole weeks, as weekdays differ."""


@dataclass(frozen=True)
class Dates:
    """New dates (at least one) and the up to `EARLIER_DATES` dates before the first of them; ascending."""

    new: tuple[date, ...]
    earlier: tuple[date, ...]


def choose_dates(new_dates: tuple[date, date] | None, now: Dataset, before: Dataset | None) -> Dates:
    """Choose a snapshot's dates by `drift.new_dates`, by default those that the previous snapshot lacks.

    Raises:
        DataError: the snapshot has no events. ConfigError: it has no events in `new_dates`.
    """
    dates = now.dates()
    if not dates:
        raise DataError(f"{now.path}: the snapshot lists no events")
    known = set() if before is None else set(before.dates())
    if new_dates is not None:
        new = now.dates(*new_dates)
        if not new:
            rule = f"{now.path} has no events then; its dates are {dates[0]} to {dates[-1]}"
            raise ConfigError(f"drift.new_dates: {new_dates[0]} to {new_dates[1]}: {rule}")
    else:
        new = [day for day in dates if known and day not in known] or dates[-1:]
    return Dates(tuple(new), tuple(day for day in dates if day < new[0])[-EARLIER_DATES:])
