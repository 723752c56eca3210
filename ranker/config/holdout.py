"""The dates that an arm is trained and measured on."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Literal

from pydantic import model_validator

from sidestack.infra.config import Config, Day, Days
from sidestack.infra.errors import ConfigError
from sidestack.infra.tables import DatasetSpec

Dates = tuple[Day, Day]


def iso_dates(dates: Dates) -> list[str]:
    """Return the first and last date as text, for a summary."""
    return [day.isoformat() for day in dates]


def without_newest(dates: Dates, days: int, setting: str) -> tuple[Dates, Dates]:
    """Return the dates without the newest `days` calendar days, and those days.

    Args:
        dates: first and last, inclusive. days: how many. setting: the setting's name, for the message.

    Raises:
        ConfigError: no date would be left.
    """
    first, last = dates
    held_out = last - timedelta(days=days - 1)
    if held_out <= first:
        raise ConfigError(f"{setting}={days}: training is {first} to {last}; at least one day must be left")
    return (first, held_out - timedelta(days=1)), (held_out, last)


class HoldoutConfig(Config):
    """The dates an arm is measured on, which also determine those it is trained on."""

    kind: Literal["test", "validation", "dates"] = "test"
    """`test`: train on all training dates, measure on the test dates. `validation`: hold out the last training dates
    instead, for the choice of settings; the test dates are not read. `dates`: those of `learned` and `measured`,
    whatever the dataset's splits, for a recurring training (`pipelines.retrain`)."""
    validation_days: Days = 7
    """How many of the last training dates are held out for validation."""
    learned: dict[str, Dates] = {}
    """`dates`: by task, the first and last date whose labels are learned. Tasks whose labels mature later have earlier
    dates, so that each label is learned once, when it is known. A task that is not named learns nothing."""
    measured: dict[str, Dates] = {}
    """`dates`: by task, the first and last date whose labels are measured."""

    @model_validator(mode="after")
    def _check_dates(self) -> "HoldoutConfig":
        if (self.kind == "dates") != bool(self.learned and self.measured):
            raise ValueError(f"kind={self.kind}: learned and measured go with kind=dates, and with no other")
        for name, of_tasks in (("learned", self.learned), ("measured", self.measured)):
            for task, (first, last) in of_tasks.items():
                if first > last:
                    raise ValueError(f"{name}.{task}: {first} is after {last}")
        for task, (first, _) in self.measured.items():
            if task in self.learned and first <= self.learned[task][1]:
                raise ValueError(
                    f"measured.{task}: {first} is not after the last date learned, {self.learned[task][1]}"
                )
        return self

    @property
    def measured_labels(self) -> dict[str, Dates] | None:
        """By task, the dates whose labels are measured; None: those of all tasks, on all held-out dates."""
        return self.measured if self.kind == "dates" else None

    @property
    def learned_labels(self) -> dict[str, Dates] | None:
        """By task, the dates whose labels are learned; None: those of all tasks, on all training dates."""
        return self.learned if self.kind == "dates" else None

    def require_tasks(self, tasks: Iterable[str]) -> None:
        """Check that the tasks named are a dataset's.

        Raises:
            ConfigError: a task is unknown.
        """
        known = tuple(tasks)
        for task in (*self.learned, *self.measured):
            if task not in known:
                raise ConfigError(f"ranker.holdout: task {task!r} is unknown; tasks are {', '.join(known)}")

    def windows(self, spec: DatasetSpec) -> tuple[Dates, Dates]:
        """Return the dates to train on and those to measure on, each first and last, inclusive.

        Raises:
            ConfigError: validation would leave no date to train on.
        """
        if self.kind == "test":
            return spec.train, spec.test
        if self.kind == "dates":
            return _hull(self.learned.values()), _hull(self.measured.values())
        return without_newest(spec.train, self.validation_days, "ranker.holdout.validation_days")


def _hull(spans: Iterable[Dates]) -> Dates:
    firsts, lasts = zip(*spans, strict=True)
    return min(firsts), max(lasts)
