"""The `drift` section: how drift is measured."""

from datetime import date

from pydantic import PositiveInt, model_validator

from sidestack.infra.config import Config, Seed


class DriftConfig(Config):
    """Section `drift`."""

    new_dates: tuple[date, date] | None = None
    """First and last new date of this cycle, inclusive; by default the dates that the previous cycle's snapshot lacks,
    or the last date if it lacks none or is not given."""
    sample_items: PositiveInt = 20_000
    """Maximum number of new items, and of old items, whose reconstruction is measured; the same for users."""
    seed: Seed = 0
    """Seed of the samples of items and impressions."""

    @model_validator(mode="after")
    def _check_dates(self) -> "DriftConfig":
        if self.new_dates is not None and self.new_dates[0] > self.new_dates[1]:
            raise ValueError(f"new_dates: {self.new_dates[0]} must not be after {self.new_dates[1]}")
        return self
