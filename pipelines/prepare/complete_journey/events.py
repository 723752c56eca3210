"""A day's events: impressions with features known strictly before them, and labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from sidestack.pipelines.prepare.columns import Ragged, nullable
from sidestack.pipelines.prepare.complete_journey.impressions import Impressions, impressions
from sidestack.pipelines.prepare.complete_journey.log import DAY, Promotions, RawLog, Timeline, midnight

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Who = tuple[Ints, Ints, Ints]
"""Users, items and stores of some rows: the keys of counts."""

COUNTED_CATEGORIES = ("type", "category")
"""The items' categoricals by which purchases and impressions are counted."""
_PURCHASED: Mapping[str, tuple[int, ...]] = {
    "item": (0, 28, 7, 2),
    "item_store": (0, 28, 7),
    **{name: (28,) for name in COUNTED_CATEGORIES},
    **{f"household_{name}": (0, 28) for name in ("item", *COUNTED_CATEGORIES)},
}
"""Key of purchase counts -> windows in days before the impression; 0: all earlier days."""
_SHOWN = ("item", "type", "household_type")
"""Keys by which earlier impressions and their clicks are counted."""
SHOWN_DAYS = 28
"""Window in days of these counts. Counts of all days since the first training date would be larger on later dates."""
_RECENT = ("item", *(f"household_{name}" for name in ("item", *COUNTED_CATEGORIES)))
"""Keys for which the newest purchase's recency is a feature."""


def _column(name: str, days: int) -> str:
    return f"{name}_{days}d" if days else name


DENSE = (
    *(_column(f"{name}_purchases", days) for name, windows in _PURCHASED.items() for days in windows),
    *(f"{name}_recency" for name in _RECENT),
    "item_age",
    *(_column(f"{name}_{what}", SHOWN_DAYS) for name in _SHOWN for what in ("impressions", "clicks")),
)
REQUEST_DENSE = (
    "household_purchases",
    "household_purchases_28d",
    "household_baskets",
    "household_baskets_28d",
    "household_recency",
    _column("household_impressions", SHOWN_DAYS),
    _column("household_clicks", SHOWN_DAYS),
)
"""Counts are numbers, ages are days, recencies are between 0 (never) and 1 (just now); all of earlier events."""


@dataclass(frozen=True)
class EventSettings:
    """Settings of the events.

    Attributes:
        draws: promoted products drawn for a basket. seed: seed of the draws.
        max_history: maximum number of newest purchases in a history. followup_days: days after which a conversion is
            known.
        stores: the source's ids of the stores with a place of their own; all others share place 0.
        demographics: user -> ids in the sparse column of that name.
        categories: for each of `COUNTED_CATEGORIES`, every item's id; items without one (-1) share a count.
    """

    draws: int
    seed: int
    max_history: int
    followup_days: int
    stores: Ints
    demographics: Ragged
    categories: Mapping[str, Ints]


class EventBuilder:
    """Builder of any day's events from a raw log.

    Only labels use data from the impression's time or later: a log that is cut after a row produces the same row. The
    indices are built once; a day costs some ten thousand rows.

    Args of the constructor:
        log: all purchases, for labels and items' sales. settings: of the events.
        promotions: the promotions of the dates' weeks and of `SHOWN_DAYS` before them.
        dates: first and last date.
        surface: the purchases that household features may use; by default all.
    """

    def __init__(
        self,
        log: RawLog,
        promotions: Promotions,
        settings: EventSettings,
        dates: tuple[date, date],
        surface: RawLog | None = None,
    ) -> None:
        self.log = log
        self.promotions = promotions
        self.settings = settings
        self.surface = known = log if surface is None else surface
        first, end = midnight(dates[0]) - SHOWN_DAYS * DAY, midnight(dates[1]) + DAY
        self._seen = seen = impressions(log, promotions, first, end, settings.draws, settings.seed)
        self._groups = {
            "item": np.arange(log.num_items),
            **{name: settings.categories[name] + 1 for name in COUNTED_CATEGORIES},
        }
        of_log, of_known = ((one.users_P, one.items_P, one.stores_P) for one in (log, known))
        heads_B = np.unique(known.baskets_P, return_index=True)[1]
        self._baskets_of_user = Timeline(known.users_P[heads_B], known.times_P[heads_B])
        self._lines_of_item_by_user = Timeline(self._keys("household_item", of_log), log.times_P)
        self._lines = {
            name: Timeline(self._keys(name, of_known), known.times_P)
            if name.startswith("household")
            else Timeline(self._keys(name, of_log), log.times_P)
            for name in ("household", *_PURCHASED)
        }
        clicked_N = np.flatnonzero(seen.clicks_N)
        self._shown = {
            name: (Timeline(keys_N, seen.times_N), Timeline(keys_N[clicked_N], seen.times_N[clicked_N]))
            for name in ("household", *_SHOWN)
            for keys_N in [self._keys(name, _who(seen))]
        }

    def day(self, day: date) -> dict[str, Any]:
        """Return a day's columns by name, as arrays, Arrow arrays or `Ragged`, ordered by time."""
        seen = self._seen.between(midnight(day), midnight(day + timedelta(days=1)))
        return {
            "request_id": seen.baskets_N,
            "event_time": as_times(seen.times_N),
            "user_id": seen.users_N,
            "item_id": seen.items_N,
            "click": seen.clicks_N.astype(np.int8),
            "conversion": self._conversions(seen),
            **self._dense(seen),
            **self._request_dense(seen),
            **self._sparse(seen),
            **self._history(seen),
        }

    def _conversions(self, seen: Impressions) -> Any:
        """Return whether the clicked item was bought again in a later basket; null if the log ends too early."""
        later_N = seen.times_N + self.settings.followup_days * DAY
        pairs_N = self._keys("household_item", _who(seen))
        again_N = self._lines_of_item_by_user.within(pairs_N, seen.times_N + 1, later_N + 1) > 0
        return nullable((seen.clicks_N & again_N).astype(np.int8), later_N < self.log.end)

    def _dense(self, seen: Impressions) -> dict[str, Floats]:
        who, times_N = _who(seen), seen.times_N
        found: dict[str, Floats] = {}
        for name, windows in _PURCHASED.items():
            keys_N, lines = self._keys(name, who), self._lines[name]
            found |= {_column(f"{name}_purchases", days): _counted(lines, keys_N, times_N, days) for days in windows}
            if name in _RECENT:
                found[f"{name}_recency"] = _recency(lines.last_before(keys_N, times_N), times_N)
        found["item_age"] = _age(self._lines["item"].first_before(seen.items_N, times_N), times_N)
        for name in _SHOWN:
            found |= self._earlier_impressions(name, seen)
        return found

    def _request_dense(self, seen: Impressions) -> dict[str, Floats]:
        users_N, times_N, baskets = seen.users_N, seen.times_N, self._baskets_of_user
        counts = {
            _column(f"household_{what}", days): _counted(of_user, users_N, times_N, days)
            for what, of_user in (("purchases", self._lines["household"]), ("baskets", baskets))
            for days in (0, 28)
        }
        return {
            **counts,
            "household_recency": _recency(baskets.last_before(users_N, times_N), times_N),
            **self._earlier_impressions("household", seen),
        }

    def _earlier_impressions(self, name: str, seen: Impressions) -> dict[str, Floats]:
        keys_N = self._keys(name, _who(seen))
        return {
            _column(f"{name}_{what}", SHOWN_DAYS): _counted(moments, keys_N, seen.times_N, SHOWN_DAYS)
            for what, moments in zip(("impressions", "clicks"), self._shown[name], strict=True)
        }

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
        # A log is ordered by household and time, as are the timeline's positions.
        stops_N = self._lines["household"].position(seen.users_N, seen.times_N)
        earlier_N = self._lines["household"].before(seen.users_N, seen.times_N)
        starts_N = stops_N - np.minimum(earlier_N, self.settings.max_history)
        return {
            "history_item_ids": Ragged.spans(self.surface.items_P, starts_N, stops_N),
            "history_times": Ragged.spans(as_times(self.surface.times_P), starts_N, stops_N),
        }

    def _keys(self, name: str, who: Who) -> Ints:
        """Return the id of each row's household, item, ... that is the key of a count."""
        users_N, items_N, stores_N = who
        if name == "household":
            return users_N
        if name == "item_store":
            return store_places(self.settings.stores, stores_N) * self.log.num_items + items_N
        of_item_I = self._groups[name.removeprefix("household_")]
        keys_N = of_item_I[items_N]
        return users_N * (int(of_item_I.max()) + 1) + keys_N if name.startswith("household_") else keys_N


def _who(seen: Impressions) -> Who:
    return seen.users_N, seen.items_N, seen.stores_N


def as_times(seconds_N: Ints) -> npt.NDArray[np.datetime64]:
    """Return seconds as the contract's microsecond timestamps."""
    return (seconds_N * 1_000_000).astype("datetime64[us]")


def store_places(known: Ints, stores_N: Ints) -> Ints:
    """Return each store's place, 1 + its rank among the known (ascending) ids, or 0."""
    if not len(known):
        return np.zeros_like(stores_N)
    at_N = np.minimum(np.searchsorted(known, stores_N), len(known) - 1)
    return np.where(known[at_N] == stores_N, at_N + 1, 0)


def _counted(moments: Timeline, keys_N: Ints, times_N: Ints, days: int = 0) -> Floats:
    """Count each key's moments strictly before its time, within a window of days; 0: all."""
    first_N = times_N - days * DAY if days else np.zeros_like(times_N)
    return moments.within(keys_N, first_N, times_N).astype(np.float32)


def _age(first_N: Ints, times_N: Ints) -> Floats:
    """Return the days since `first`; 0 if there was none (-1)."""
    return np.where(first_N >= 0, (times_N - first_N) / DAY, 0.0).astype(np.float32)


def _recency(last_N: Ints, times_N: Ints) -> Floats:
    """Return 1 / (1 + weeks since `last`): 1 for just now, decreasing to 0 with time, 0 for never (-1)."""
    weeks_N = (times_N - last_N) / (7 * DAY)
    return np.where(last_N >= 0, 1.0 / (1.0 + weeks_N), 0.0).astype(np.float32)
