"""A day's events: impressions with what was known strictly before them, and their labels."""

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.prepare.columns import Ragged, nullable
from pipelines.prepare.complete_journey.impressions import Impressions, impressions
from pipelines.prepare.complete_journey.log import DAY, Promotions, RawLog, Timeline, midnight

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

DENSE = (
    "item_purchases",
    "item_purchases_28d",
    "item_store_purchases",
    "item_age",
    "household_item_purchases",
    "household_item_recency",
)
REQUEST_DENSE = ("household_baskets", "household_recency")
"""Counts n of what came before, squashed by log(1 + n) / log(1 + usual n); ages and recencies from days."""


@dataclass(frozen=True)
class EventSettings:
    """What the events depend on beside the log.

    Attributes:
        draws: promoted products drawn for a basket. seed: seed of the draws.
        max_history: newest purchases in a history. followup_days: days after which a conversion is known.
        stores: the source's ids of the stores that have a place of their own; any other shares place 0.
        demographics: user -> ids in the sparse column of that name.
    """

    draws: int
    seed: int
    max_history: int
    followup_days: int
    stores: Ints
    demographics: Ragged


class EventBuilder:
    """Builds the events of any day from a raw log.

    Nothing but the labels looks at the impression's own time or later: a log that is cut after a row gives the
    same row. The indices are made once; a day costs some ten thousand rows.

    Args of the constructor:
        log: all purchases: labels, and how much an item sells. promotions: what can be shown. settings: all else.
        surface: those of the purchases that a row may know of its household; all, unless said otherwise.
    """

    def __init__(
        self, log: RawLog, promotions: Promotions, settings: EventSettings, surface: RawLog | None = None
    ) -> None:
        self.log = log
        self.promotions = promotions
        self.settings = settings
        self.surface = known = log if surface is None else surface
        heads_B = np.unique(known.baskets_P, return_index=True)[1]
        self._lines_of_user = Timeline(known.users_P, known.times_P)
        self._baskets_of_user = Timeline(known.users_P[heads_B], known.times_P[heads_B])
        self._known_lines_of_item_by_user = Timeline(self._by_user(known.users_P, known.items_P), known.times_P)
        self._lines_of_item = Timeline(log.items_P, log.times_P)
        self._lines_of_item_in_store = Timeline(self._in_store(log.stores_P, log.items_P), log.times_P)
        self._lines_of_item_by_user = Timeline(self._by_user(log.users_P, log.items_P), log.times_P)

    def day(self, day: date) -> dict[str, Any]:
        """Return a day's columns by name, as arrays, Arrow arrays or `Ragged`, in order of time."""
        settings = self.settings
        first, end = midnight(day), midnight(day + timedelta(days=1))
        seen = impressions(self.log, self.promotions, first, end, settings.draws, settings.seed)
        return {
            "request_id": seen.baskets_N,
            "event_time": as_times(seen.times_N),
            "user_id": seen.users_N,
            "item_id": seen.items_N,
            "click": seen.clicks_N.astype(np.int8),
            "conversion": self._conversions(seen),
            **self._dense(seen),
            **self._sparse(seen),
            **self._history(seen),
        }

    def _conversions(self, seen: Impressions) -> Any:
        """Say whether the clicked item was bought again in a later basket; null where the log ends too early."""
        later_N = seen.times_N + self.settings.followup_days * DAY
        pairs_N = self._by_user(seen.users_N, seen.items_N)
        again_N = self._lines_of_item_by_user.within(pairs_N, seen.times_N + 1, later_N + 1) > 0
        return nullable((seen.clicks_N & again_N).astype(np.int8), later_N < self.log.end)

    def _dense(self, seen: Impressions) -> dict[str, Floats]:
        items_N, times_N = seen.items_N, seen.times_N
        in_store_N = self._in_store(seen.stores_N, items_N)
        pairs_N = self._by_user(seen.users_N, items_N)
        columns_N = (
            _squashed(self._lines_of_item.before(items_N, times_N), 1000),
            _squashed(self._lines_of_item.within(items_N, times_N - 28 * DAY, times_N), 100),
            _squashed(self._lines_of_item_in_store.before(in_store_N, times_N), 100),
            _age(self._lines_of_item.first_before(items_N, times_N), times_N),
            _squashed(self._known_lines_of_item_by_user.before(pairs_N, times_N), 10),
            _recency(self._known_lines_of_item_by_user.last_before(pairs_N, times_N), times_N),
            _squashed(self._baskets_of_user.before(seen.users_N, times_N), 100),
            _recency(self._baskets_of_user.last_before(seen.users_N, times_N), times_N),
        )
        return dict(zip((*DENSE, *REQUEST_DENSE), columns_N, strict=True))

    def _sparse(self, seen: Impressions) -> dict[str, Ragged]:
        starts_N, stops_N = (self.promotions.starts_K1[seen.promotions_N + more] for more in (0, 1))
        who = self.settings.demographics
        return {
            "display": Ragged.spans(self.promotions.displays_M, starts_N, stops_N),
            "mailer": Ragged.spans(self.promotions.mailers_M, starts_N, stops_N),
            "store": Ragged.single(store_places(self.settings.stores, seen.stores_N)),
            "hour": Ragged.single(seen.times_N % DAY // 3600),
            "weekday": Ragged.single((seen.times_N // DAY + 3) % 7),  # 1970-01-01 was a Thursday
            "demographics": Ragged.spans(who.values, who.offsets_N1[seen.users_N], who.offsets_N1[seen.users_N + 1]),
        }

    def _history(self, seen: Impressions) -> dict[str, Ragged]:
        """Return the household's newest known purchases strictly before the impression, oldest first."""
        # A log is in order of household and time, as the timeline's positions are.
        stops_N = self._lines_of_user.position(seen.users_N, seen.times_N)
        earlier_N = self._lines_of_user.before(seen.users_N, seen.times_N)
        starts_N = stops_N - np.minimum(earlier_N, self.settings.max_history)
        return {
            "history_item_ids": Ragged.spans(self.surface.items_P, starts_N, stops_N),
            "history_times": Ragged.spans(as_times(self.surface.times_P), starts_N, stops_N),
        }

    def _by_user(self, users_N: Ints, items_N: Ints) -> Ints:
        return users_N * self.log.num_items + items_N

    def _in_store(self, stores_N: Ints, items_N: Ints) -> Ints:
        return store_places(self.settings.stores, stores_N) * self.log.num_items + items_N


def as_times(seconds_N: Ints) -> npt.NDArray[np.datetime64]:
    """Return seconds as the contract's microsecond timestamps."""
    return (seconds_N * 1_000_000).astype("datetime64[us]")


def store_places(known: Ints, stores_N: Ints) -> Ints:
    """Return each store's place, 1 + its rank among the known (ascending) ids, or 0."""
    if not len(known):
        return np.zeros_like(stores_N)
    at_N = np.minimum(np.searchsorted(known, stores_N), len(known) - 1)
    return np.where(known[at_N] == stores_N, at_N + 1, 0)


def _squashed(counts_N: Ints, usual: int) -> Floats:
    return np.asarray(np.log1p(counts_N) / np.log1p(usual), np.float32)


def _age(first_N: Ints, times_N: Ints) -> Floats:
    """Return the squashed days since `first`, 0 where there was none (-1)."""
    days_N = np.where(first_N >= 0, (times_N - first_N) / DAY, 0.0)
    return np.asarray(np.log1p(days_N) / np.log1p(365), np.float32)


def _recency(last_N: Ints, times_N: Ints) -> Floats:
    """Return 1 / (1 + weeks since `last`): 1 for just now, towards 0 with time, 0 for never (-1)."""
    weeks_N = (times_N - last_N) / (7 * DAY)
    return np.where(last_N >= 0, 1.0 / (1.0 + weeks_N), 0.0).astype(np.float32)
