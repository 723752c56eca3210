"""Impressions: every promoted purchase, a sample of the rest, and no dependence on other baskets."""

import numpy as np

from sidestack.pipelines.prepare.complete_journey.impressions import Impressions, impressions
from sidestack.pipelines.prepare.complete_journey.log import RawLog, week_of
from tests.pipelines.prepare.complete_journey import fabricated

FIRST, END = fabricated.week_start(4), fabricated.week_start(9)


def rows_of(seen: Impressions) -> set[tuple[int, ...]]:
    columns = (seen.users_N, seen.times_N, seen.stores_N, seen.items_N, seen.clicks_N)
    return set(zip(*(column.tolist() for column in columns), strict=True))


def made(log: RawLog, draws: int = 4) -> Impressions:
    return impressions(log, fabricated.promotions(5), FIRST, END, draws=draws, seed=9)


def test_every_promoted_purchase_is_a_click_and_nothing_else_is() -> None:
    log, rows = fabricated.raw_log(5), fabricated.promotion_rows(5)
    promoted = set(zip(rows["weeks"].tolist(), rows["stores"].tolist(), rows["items"].tolist(), strict=True))
    weeks_P = week_of(log.times_P)
    expected = {
        (user, time, store, item, True)
        for user, time, store, item, week in zip(
            log.users_P.tolist(), log.times_P.tolist(), log.stores_P.tolist(), log.items_P.tolist(), weeks_P.tolist(),
            strict=True,
        )
        if FIRST <= time < END and (week, store, item) in promoted
    }  # fmt: skip
    found = rows_of(made(log))
    assert {row for row in found if row[4]} == expected
    weeks = {row: int(week_of(np.array(row[1]))) for row in found}
    assert all((weeks[row], row[2], row[3]) in promoted for row in found)


def test_draws_of_a_basket_do_not_depend_on_the_rest_of_the_log() -> None:
    log = fabricated.raw_log(5)
    full = rows_of(made(log))
    for user in range(fabricated.NUM_USERS):
        alone = rows_of(made(log.keep(log.users_P == user)))
        assert alone == {row for row in full if row[0] == user}


def test_more_draws_show_more_and_each_product_once_per_basket() -> None:
    log = fabricated.raw_log(5)
    few, many = made(log, draws=2), made(log, draws=30)
    assert rows_of(few) < rows_of(many)
    assert many.clicks_N.mean() < few.clicks_N.mean()
    baskets = len(np.unique(log.baskets_P[(log.times_P >= FIRST) & (log.times_P < END)]))
    assert len(few.clicks_N) - few.clicks_N.sum() <= 2 * baskets
    assert (np.diff(few.times_N) >= 0).all()


def test_draws_are_spread_evenly_over_the_promoted_products() -> None:
    seen = impressions(fabricated.raw_log(6, 3000), fabricated.promotions(6), FIRST, END, draws=6, seed=1)
    shares = np.bincount(seen.promotions_N[~seen.clicks_N])
    assert 0.5 < shares[shares > 0].std() / np.sqrt(shares[shares > 0].mean()) < 4


def test_no_promotions_give_no_impressions() -> None:
    nothing = fabricated.promotions(5, last_week=0)
    assert len(impressions(fabricated.raw_log(5), nothing, FIRST, END, draws=4, seed=9).items_N) == 0
