"""Events against a slow reference, and a check that only labels depend on their own time or later."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.tables import DatasetSpec, TaskSpec, flat_schema
from sidestack.pipelines.prepare.columns import table
from sidestack.pipelines.prepare.complete_journey.events import DENSE, REQUEST_DENSE, SHOWN_DAYS, EventBuilder
from sidestack.pipelines.prepare.complete_journey.log import DAY, FIRST_MONDAY, RawLog, week_of
from tests.pipelines.prepare.complete_journey import fabricated

LABELS = ("click", "conversion")
DAYS = [FIRST_MONDAY + timedelta(days=n) for n in range(28, 63)]
SPARSE = ("display", "mailer", "store", "hour", "weekday", "demographics")
SPEC = DatasetSpec(
    embeddings={}, categoricals={}, user_categoricals={}, num_items=fabricated.NUM_ITEMS,
    num_users=fabricated.NUM_USERS, tasks={task: TaskSpec() for task in LABELS}, dense=DENSE,
    request_dense=REQUEST_DENSE, sparse=dict.fromkeys(SPARSE, 1000), max_history=8,
    train=(DAYS[0], DAYS[20]), test=(DAYS[21], DAYS[-1]), origin="made up",
)  # fmt: skip


def built(log: RawLog, seed: int, last_week: int = fabricated.WEEKS[1], surface: RawLog | None = None) -> pa.Table:
    return rows_of(DAYS, log, seed, last_week, surface)


def rows_of(
    days: list[date], log: RawLog, seed: int, last_week: int = fabricated.WEEKS[1], surface: RawLog | None = None
) -> pa.Table:
    dates, promotions = (days[0], days[-1]), fabricated.promotions(seed, last_week)
    builder = EventBuilder(log, promotions, fabricated.settings(), dates, surface)
    return pa.concat_tables([table(builder.day(day), flat_schema(SPEC)) for day in days]).combine_chunks()


def seconds(rows: pa.Table) -> np.ndarray:
    return rows["event_time"].to_numpy().astype("datetime64[s]").astype(np.int64)


@pytest.mark.parametrize("seed", range(6))
def test_cutting_the_log_changes_nothing_but_labels(seed: int) -> None:
    log = fabricated.raw_log(seed)
    full = built(log, seed)
    # Cut at any time, and exactly at a basket's second: that basket must vanish, the ones before must not change.
    instants = np.random.default_rng(seed).integers(fabricated.week_start(7), log.end, 4)
    for cut in [*instants, *np.random.default_rng(seed).choice(seconds(full)[len(full) // 3 :], 4)]:
        known = built(log.cut(int(cut)), seed, last_week=int(week_of(np.array(cut))))
        before = full.filter(pa.array(seconds(full) < cut))
        assert known.num_rows == before.num_rows > 50
        assert known.drop_columns([*LABELS]).equals(before.drop_columns([*LABELS]))
        assert known["click"].equals(before["click"])  # the basket is its own follow-up
        followed_up = seconds(before) + 14 * DAY < cut
        assert (known["conversion"].is_valid().to_numpy() == followed_up).all()
        assert (
            known["conversion"].filter(pa.array(followed_up)).equals(before["conversion"].filter(pa.array(followed_up)))
        )


@pytest.mark.parametrize("seed", range(4))
def test_features_of_a_basket_do_not_depend_on_its_own_items(seed: int) -> None:
    log = fabricated.raw_log(seed)
    full = built(log, seed)
    rng = np.random.default_rng(seed)
    compared = 0
    for instant in rng.choice(np.unique(seconds(full)), 6):
        # From this basket on, households buy something else: only clicks and conversions may change.
        items_P = np.where(
            log.times_P >= instant, rng.integers(fabricated.NUM_ITEMS, size=len(log.items_P)), log.items_P
        )
        other = built(replace(log, items_P=items_P), seed)
        rows = [{key_of(row): row for row in unlabelled(table, int(instant))} for table in (full, other)]
        common = rows[0].keys() & rows[1].keys()
        assert all(rows[0][key] == rows[1][key] for key in common)
        compared += len(common)
    assert compared > 15


def unlabelled(rows: pa.Table, instant: int) -> list[dict[str, Any]]:
    return rows.filter(pa.array(seconds(rows) == instant)).drop_columns([*LABELS]).to_pylist()


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["user_id"], row["item_id"], row["event_time"], *row["store"]


@pytest.mark.parametrize("share_known", [1.0, 0.6])
def test_events_equal_the_slow_reference(share_known: float) -> None:
    log = fabricated.raw_log(1)
    known = log.keep(np.random.default_rng(0).random(len(log.users_P)) < share_known)
    rows = built(log, 1, surface=known).to_pylist()
    before = rows_of([DAYS[0] - timedelta(days=n) for n in range(SHOWN_DAYS, 0, -1)], log, 1).to_pylist()
    assert any(row["conversion"] for row in rows) and any(row["conversion"] is None for row in rows)
    assert any(len(row["history_item_ids"]) == 8 for row in rows)
    for row in rows[::7]:
        for name, value in reference(log, known, row, [*before, *rows]).items():
            expected = pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value
            assert row[name] == expected, name


def lines_of(log: RawLog) -> list[tuple[int, ...]]:
    return list(zip(log.users_P, log.items_P, log.times_P, log.baskets_P, log.stores_P, strict=True))


def reference(log: RawLog, known: RawLog, row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute a row's columns line by line from the whole log and the known log of the household."""
    at = second_of(row)
    user, item = row["user_id"], row["item_id"]
    lines = lines_of(log)
    basket_stores = {store for who, _, when, _, store in lines if who == user and when == at}
    own = [line for line in lines_of(known) if line[0] == user and line[2] < at]
    baskets = {basket: when for _, _, when, basket, _ in own}
    later = [when for who, what, when, _, _ in lines if (who, what) == (user, item) and at < when <= at + 14 * DAY]
    history = [(when, what) for _, what, when, _, _ in own][-8:]
    expected: dict[str, Any] = {
        **purchases(lines, own, item, at),
        **counted_impressions(row, rows),
        "household_baskets": float(len(baskets)),
        "household_baskets_28d": float(sum(when >= at - 28 * DAY for when in baskets.values())),
        "household_recency": recency(list(baskets.values()), at),
        "conversion": None if at + 14 * DAY >= log.end else int(bool(row["click"] and later)),
        "hour": [row["event_time"].hour],
        "weekday": [row["event_time"].weekday()],
        "history_item_ids": [what for _, what in history],
        "history_times": [datetime.fromtimestamp(when, UTC).replace(tzinfo=None) for when, _ in history],
    }
    if len(basket_stores) == 1:  # else two baskets of the household share the second
        store = basket_stores.pop()
        known_stores = {300: 1, 302: 2}
        expected["store"] = [known_stores.get(store, 0)]
        same = [when for _, what, when, _, where in lines
                if what == item and known_stores.get(where, 0) == known_stores.get(store, 0)]  # fmt: skip
        for name, days in (("", 0), ("_28d", 28), ("_7d", 7)):
            expected[f"item_store_purchases{name}"] = number(same, at, days)
    return expected


def purchases(lines: list[tuple[int, ...]], own: list[tuple[int, ...]], item: int, at: int) -> dict[str, float]:
    """Compute the features of purchases of the item, its category and type, by all and by the household."""
    found: dict[str, float] = {"household_purchases": float(len(own))}
    found["household_purchases_28d"] = number([line[2] for line in own], at, 28)
    groups = {"item": np.arange(fabricated.NUM_ITEMS), **fabricated.settings().categories}
    for name, of_item_I in groups.items():
        by_all, by_household = (
            [line[2] for line in some if of_item_I[line[1]] == of_item_I[item]] for some in (lines, own)
        )
        for days in (0, 28, 7, 2) if name == "item" else (28,):
            found[f"{name}_purchases" + f"_{days}d" * bool(days)] = number(by_all, at, days)
        for days in (0, 28):
            found[f"household_{name}_purchases" + f"_{days}d" * bool(days)] = number(by_household, at, days)
        found[f"household_{name}_recency"] = recency(by_household, at)
        if name == "item":
            earlier = [when for when in by_all if when < at]
            found["item_recency"] = recency(earlier, at)
            found["item_age"] = (at - min(earlier)) / DAY if earlier else 0.0
    return found


def counted_impressions(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Count the impressions in the days before a row, and their clicks, of its household, its item and its type."""
    type_I = fabricated.settings().categories["type"]
    days = timedelta(days=SHOWN_DAYS)
    earlier = [one for one in rows if row["event_time"] - days <= one["event_time"] < row["event_time"]]
    own = [one for one in earlier if one["user_id"] == row["user_id"]]
    same_type = [one for one in earlier if type_I[one["item_id"]] == type_I[row["item_id"]]]
    groups = {
        "household": own,
        "item": [one for one in earlier if one["item_id"] == row["item_id"]],
        "type": same_type,
        "household_type": [one for one in same_type if one["user_id"] == row["user_id"]],
    }
    found = {f"{name}_impressions_28d": float(len(some)) for name, some in groups.items()}
    return found | {f"{name}_clicks_28d": float(sum(one["click"] for one in some)) for name, some in groups.items()}


def second_of(row: dict[str, Any]) -> int:
    return int(row["event_time"].replace(tzinfo=UTC).timestamp())


def number(times: list[int], at: int, days: int) -> float:
    return float(sum(when < at and (not days or when >= at - days * DAY) for when in times))


def recency(times: list[int], at: int) -> float:
    return 1 / (1 + (at - max(times)) / 7 / DAY) if times else 0.0


def test_promotion_slots_and_demographics() -> None:
    log, promotions, settings = fabricated.raw_log(2), fabricated.promotion_rows(2), fabricated.settings()
    rows = built(log, 2).to_pylist()
    assert {len(row["display"]) for row in rows} == {1, 2}
    for row in rows[::5]:
        week = int(week_of(np.array(int(row["event_time"].replace(tzinfo=UTC).timestamp()))))
        chosen = (promotions["weeks"] == week) & (promotions["items"] == row["item_id"])
        by_store = [
            sorted(zip(promotions["displays"][chosen & (promotions["stores"] == store)].tolist(),
                       promotions["mailers"][chosen & (promotions["stores"] == store)].tolist(), strict=True))
            for store in (300, 301)
        ]  # fmt: skip
        assert list(zip(row["display"], row["mailer"], strict=True)) in by_store
        offsets = settings.demographics.offsets_N1[row["user_id"] : row["user_id"] + 2]
        assert row["demographics"] == settings.demographics.values[slice(*offsets)].tolist()


def test_conversion_is_censored_at_the_end_of_the_log() -> None:
    rows = built(fabricated.raw_log(3), 3)
    end = fabricated.week_start(11)
    assert (rows["conversion"].is_valid().to_numpy() == (seconds(rows) + 14 * DAY < end)).all()
    unclicked = rows.filter(pa.array(rows["click"].to_numpy() == 0))["conversion"].drop_null()
    assert set(unclicked.to_pylist()) == {0}
