"""Parsing and checking of a request: each error names its field and its rule.

A request is one user, one history and N candidates:

    {"user": {"user_id": 7, ...}, "time": "2024-01-05T12:00:00Z",
     "history": {"item_ids": [3, 9], "times": ["2024-01-03T08:00:00Z", ...]},
     "candidates": [{"item_id": 5, "price": 2.5, "slot": [1]}, {"signals": {"text_embedding": [...]}, ...}]}

Unknown ids are counted, not refused: a user or an item may be new. Invalid values are refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from sidestack.infra.errors import DataError, short
from sidestack.infra.tables import DatasetSpec

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Values = Mapping[str, Any]

UNKNOWN = -1
"""Stands for an unknown id."""
_KEYS = {"user", "time", "history", "candidates"}
_HISTORY_KEYS = {"item_ids", "times"}
_MAX_LISTED = 100_000
"""The most ids that the sparse columns of a request may hold; each takes a row of a table in memory."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass
class Parsed:
    """A request with N candidates and T history entries.

    Attributes:
        user_id: `UNKNOWN` for an unknown user. time: microseconds since 1970, UTC.
        history_ids_T, history_times_T: oldest first; ids and times in the same form.
        items_N: the candidates' ids.
        signals: by place of a candidate, its signals for an encoder.
        dense: values by column, of one request or N candidates. sparse: ids by column, a list each.
        unknown: the number of unknown ids, by kind.
    """

    user_id: int
    time: int
    history_ids_T: Integers
    history_times_T: Integers
    items_N: Integers
    signals: dict[int, Values]
    dense: dict[str, Floats]
    sparse: dict[str, list[list[int]]]
    unknown: dict[str, int] = field(default_factory=dict)

    def newest(self, entries: int | None) -> "Parsed":
        """Return the request with the history's newest `entries` entries, as in training; None: all."""
        if entries is None or entries >= len(self.history_ids_T):
            return self
        ids_T, times_T = self.history_ids_T[-entries:], self.history_times_T[-entries:]
        return replace(self, history_ids_T=ids_T, history_times_T=times_T)

    def count_unknown(self, what: str, number: int) -> None:
        """Add to the count of unknown ids."""
        if number:
            self.unknown[what] = self.unknown.get(what, 0) + number


class RequestParser:
    """A parser that checks requests against a dataset's description.

    Args:
        spec: the dataset that the ranker was trained on. signals: the signals of a new item for its encoders.
        max_candidates, max_history: bounds of a request.
    """

    def __init__(self, spec: DatasetSpec, signals: set[str], max_candidates: int, max_history: int) -> None:
        self._spec, self._signals = spec, signals
        self._max_candidates, self._max_history = max_candidates, max_history
        self._of_user = {"user_id", *spec.request_dense, *spec.request_sparse}
        self._of_candidate = {"item_id", "signals", *spec.dense, *spec.sparse}

    def parse(self, request: object, where: str) -> Parsed:
        """Parse and check one request.

        Args:
            request: the decoded JSON value. where: its name in messages, such as ``inputs[0]``.

        Raises:
            DataError: names field and rule.
        """
        values = _object(request, where, _KEYS)
        user = _object(_value_or(values.get("user"), {}), f"{where}.user", self._of_user)
        time = _time(values.get("time"), f"{where}.time")
        ids, times_T = self._history(values.get("history"), time, f"{where}.history")
        candidates = self._candidates(values.get("candidates"), f"{where}.candidates")
        places = [f"{where}.candidates[{n}]" for n in range(len(candidates))]
        user_id = self._id(user.get("user_id"), self._spec.num_users, f"{where}.user.user_id")
        items = [
            self._id(one.get("item_id"), self._spec.num_items, f"{place}.item_id")
            for one, place in zip(candidates, places, strict=True)
        ]
        parsed = Parsed(
            user_id, time, np.array(ids, np.int64), times_T, np.array(items, np.int64), {}, dense={}, sparse={}
        )
        parsed.signals = {
            n: _object(one["signals"], f"{place}.signals", self._signals)
            for n, (one, place) in enumerate(zip(candidates, places, strict=True))
            if one.get("signals") is not None
        }
        parsed.count_unknown("user", user_id == UNKNOWN)
        parsed.count_unknown("items", items.count(UNKNOWN))
        parsed.count_unknown("history", ids.count(UNKNOWN))
        self._columns(parsed, [user], [f"{where}.user"], self._spec.request_dense, self._spec.request_sparse)
        self._columns(parsed, candidates, places, self._spec.dense, self._spec.sparse)
        return parsed

    def _candidates(self, value: object, where: str) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            raise DataError(f"{where}: must be a list of objects, is {short(value)}")
        if not 1 <= len(value) <= self._max_candidates:
            raise DataError(f"{where}: has {len(value)} entries, must have 1 to {self._max_candidates}")
        return [_object(one, f"{where}[{n}]", self._of_candidate) for n, one in enumerate(value)]

    def _history(self, value: object, time: int, where: str) -> tuple[list[int], Integers]:
        history = _object(_value_or(value, {}), where, _HISTORY_KEYS)
        ids, times = history.get("item_ids", []), history.get("times", [])
        for name, entries in (("item_ids", ids), ("times", times)):
            if not isinstance(entries, list):
                raise DataError(f"{where}.{name}: must be a list, is {short(entries)}")
        if len(ids) != len(times):
            raise DataError(f"{where}: has {len(ids)} item_ids and {len(times)} times, must have as many of both")
        if len(ids) > self._max_history:
            raise DataError(f"{where}: has {len(ids)} entries, may have {self._max_history}")
        times_T = _times(times, f"{where}.times")
        if len(times_T) and np.any(np.diff(times_T) < 0):
            at = int(np.argmax(np.diff(times_T) < 0)) + 1
            raise DataError(f"{where}.times[{at}]: {times[at]} is before the entry before it; oldest come first")
        if len(times_T) and times_T[-1] > time:
            raise DataError(f"{where}.times[{len(times) - 1}]: {times[-1]} is after the request's time")
        found = [self._id(one, self._spec.num_items, f"{where}.item_ids[{n}]") for n, one in enumerate(ids)]
        return found, times_T

    @staticmethod
    def _id(value: object, number: int, where: str) -> int:
        """Return an id in [0, number), or `UNKNOWN` for a missing or larger id."""
        if value is None:
            return UNKNOWN
        found = _integer(value, where)
        if found < 0:
            raise DataError(f"{where}: {short(value)} is negative")
        return found if found < number else UNKNOWN

    def _columns(
        self,
        parsed: Parsed,
        rows: Sequence[Values],
        places: Sequence[str],
        dense: Sequence[str],
        sparse: Mapping[str, int],
    ) -> None:
        for name in dense:
            parsed.dense[name] = _numbers([row.get(name) for row in rows], name, places)
        listed = sum(len(row[name]) for name in sparse for row in rows if isinstance(row.get(name), list))
        if listed > _MAX_LISTED:
            rule = f"the lists of ids hold {listed:,} together, may hold {_MAX_LISTED:,}"
            raise DataError(f"{places[0].removesuffix('[0]')}: {rule}")
        for name, number in sparse.items():
            lists = [_ids(row.get(name), f"{place}.{name}") for row, place in zip(rows, places, strict=True)]
            known = [[one for one in ids if one < number] for ids in lists]
            parsed.count_unknown(name, sum(map(len, lists)) - sum(map(len, known)))
            parsed.sparse[name] = known


def _object(value: object, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object, is {short(value)}")
    for name in value:
        if name not in known:
            raise DataError(f"{where}: unknown field {short(name)}; it may have {', '.join(sorted(known)) or 'none'}")
    return value


def _numbers(values: list[Any], name: str, places: Sequence[str]) -> Floats:
    """Return one column's values, float32 [N]."""
    for value, place in zip(values, places, strict=True):
        if type(value) not in (float, int):  # excludes bool
            rule = "is missing" if value is None else f"must be a number, is {short(value)}"
            raise DataError(f"{place}.{name}: {rule}")
    try:
        with np.errstate(over="ignore"):  # raised below
            found_N = np.array(values, np.float64).astype(np.float32)
    except OverflowError:  # an integer too large for a double
        found_N = np.array([value if abs(value) < 1e39 else math.inf for value in values], np.float32)
    wrong = np.flatnonzero(~np.isfinite(found_N))
    if len(wrong):
        raise DataError(f"{places[wrong[0]]}.{name}: {short(values[wrong[0]])} is not finite in float32")
    return found_N


def _integer(value: object, where: str) -> int:
    """Return an integer; 3.0 counts as 3, as some JSON writers have only doubles."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value != value
        or value in (math.inf, -math.inf)
    ):
        raise DataError(f"{where}: must be an integer, is {short(value)}")
    if value != int(value):
        raise DataError(f"{where}: must be an integer, is {short(value)}")
    return int(value)


def _ids(value: object, where: str) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{where}: must be a list of ids, is {short(value)}")
    found = [_integer(one, f"{where}[{n}]") for n, one in enumerate(value)]
    for n, one in enumerate(found):
        if one < 0:
            raise DataError(f"{where}[{n}]: {one} is negative")
    return found


def _time(value: object, where: str) -> int:
    return int(datetime.now(UTC).timestamp() * 1e6) if value is None else _micros(value, where)


def _times(values: list[Any], where: str) -> Integers:
    """Return times in microseconds: ISO 8601 texts (UTC where they name no zone) or seconds since 1970."""
    return np.array([_micros(one, f"{where}[{n}]") for n, one in enumerate(values)], np.int64)


def _micros(value: object, where: str) -> int:
    if type(value) in (int, float):  # excludes bool
        if not abs(value) <= 1e11:  # type: ignore[arg-type]
            raise DataError(f"{where}: {short(value)}: must be seconds since 1970")
        return round(value * 1e6)  # type: ignore[operator]
    if not isinstance(value, str) or len(value) > 40:
        raise DataError(f"{where}: must be an ISO 8601 text, is {short(value)}")
    try:
        time = datetime.fromisoformat(value)
        return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: {value!r} is not an ISO 8601 time") from error


def _value_or(value: object, default: object) -> object:
    """Return the default for a JSON null."""
    return default if value is None else value
