"""The `drift` section: how drift is measured."""

from datetime import date

from pydantic import PositiveInt, model_validator

from sidestack.infra.config import Config, Seed


class DriftConfig(Config):
    """Section `drift`."""

    new_dates: tuple[date, date] | None = None
    """First and last of the dates that are new in this cycle, inclusive; by default those that the snapshot of the
    cycle before lacks, or the last date where it lacks none or is not given."""
    sample_items: PositiveInt = 20_000
    """The most new items, and the most old ones, whose reconstruction is measured; of users alike."""
    seed: Seed = 0
    """Of the samples of items and of impressions."""

    @model_validator(mode="after")
    def _check_dates(self) -> "DriftConfig":
        if self.new_dates is not None and self.new_dates[0] > self.new_dates[1]:
            raise ValueError(f"new_dates: {self.new_dates[0]} must not be after {self.new_dates[1]}")
        return self
