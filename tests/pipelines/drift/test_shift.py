"""PSI against a computation by hand, and the sample that it is computed on."""

from collections import Counter
from datetime import date, timedelta
from math import log
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.impressions import ImpressionRows
from sidestack.infra.parquet import RowGroup
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.drift import sample
from sidestack.pipelines.drift.sample import sample_impressions
from sidestack.pipelines.drift.shift import CATEGORIES, LEAST_SHARE, column_shifts, dense_psi, sparse_psi
from tests.datasets import joined
from tests.encoder.fabricated import SPEC, events, write_dataset

COLUMNS = ["price", "slot"]


def psi_of(shares: list[tuple[float, float]]) -> float:
    floored = [(max(new, LEAST_SHARE), max(earlier, LEAST_SHARE)) for new, earlier in shares]
    return sum((p - q) * log(p / q) for p, q in floored)


def test_psi_of_numbers_is_over_the_earlier_deciles() -> None:
    earlier_N = np.random.default_rng(0).permutation(1000).astype(float)
    assert dense_psi(earlier_N, earlier_N) == 0
    upper_half_N = np.arange(500, 1000).astype(float)
    assert dense_psi(earlier_N, upper_half_N) == pytest.approx(psi_of([(0, 0.1)] * 5 + [(0.2, 0.1)] * 5))
    a_tenth_below_N = np.concatenate([np.arange(-100, 0), np.arange(100, 1000)]).astype(float)
    expected = psi_of([(0.1, 0), (0, 0.1), *[(0.1, 0.1)] * 8])
    assert dense_psi(earlier_N, a_tenth_below_N) == pytest.approx(expected)


@pytest.mark.parametrize("moved", [3.0, 7.0])
def test_psi_detects_a_constant_that_moves_either_way(moved: float) -> None:
    constant_N = np.full(50, 5.0)
    assert dense_psi(constant_N, constant_N) == 0
    assert dense_psi(constant_N, np.full(20, moved)) == pytest.approx(psi_of([(0, 1), (1, 0)]))


def test_psi_of_ids_is_over_the_most_frequent_and_the_rest() -> None:
    """Id i occurs 200 - i times; which ids are in the rest does not matter."""
    earlier = [i for i in range(150) for _ in range(200 - i)]
    new = [i % 120 for i in range(600)] + [999] * 50
    assert sparse_psi(np.array(earlier), np.array(earlier)) == 0
    times, new_times = Counter(earlier), Counter(new)
    kept = range(CATEGORIES)
    shares = [(new_times[i] / len(new), times[i] / len(earlier)) for i in kept]
    shares.append((1 - sum(p for p, _ in shares), 1 - sum(q for _, q in shares)))
    assert sparse_psi(np.array(earlier), np.array(new)) == pytest.approx(psi_of(shares))
    others = np.array([i if i < CATEGORIES else 5000 for i in earlier])
    assert sparse_psi(np.array(earlier), others) == 0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    days = {date(2024, 1, 1) + timedelta(days=i): events(date(2024, 1, 1 + i), 60 + 60 * i) for i in range(3)}
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset", days=days)


def test_small_dates_are_sampled_completely(dataset: Path) -> None:
    snapshot = read_dataset(dataset)
    rng = np.random.default_rng(0)
    first, second, third = snapshot.dates()
    found = sample_impressions(snapshot, (first, second), COLUMNS, rng)
    assert found.equals(joined(dataset, COLUMNS, first, second))
    same = column_shifts(found, found, SPEC)
    assert same == {"price": 0, "slot": 0}
    assert column_shifts(found, sample_impressions(snapshot, (third,), COLUMNS, rng), SPEC)["price"] > 0
    assert sample_impressions(snapshot, (), COLUMNS, rng).num_rows == 0


def test_large_dates_are_sampled_from_some_of_their_row_groups(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 and 180 impressions, 10 and 30 are drawn, in proportion, from two row groups of each date."""
    monkeypatch.setattr(sample, "SAMPLE_ROWS", 40)
    monkeypatch.setattr(sample, "GROUPS_A_DATE", 2)
    joined_group = ImpressionRows.joined
    read: list[RowGroup] = []

    def noted(own: ImpressionRows, group: RowGroup) -> pa.Table:
        read.append(group)
        return joined_group(own, group)

    monkeypatch.setattr(ImpressionRows, "joined", noted)
    snapshot = read_dataset(dataset)
    first, _, third = snapshot.dates()
    found = sample_impressions(snapshot, (first, third), COLUMNS, np.random.default_rng(0))
    assert len(set(read)) == len(read) == 4
    prices = set(found["price"].to_pylist())
    of_first, of_third = (set(joined(dataset, ["price"], day, day)["price"].to_pylist()) for day in (first, third))
    assert len(prices) == found.num_rows and prices <= of_first | of_third
    assert (len(prices & of_first), len(prices & of_third)) == pytest.approx((10, 30), abs=1)
