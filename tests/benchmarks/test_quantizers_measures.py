"""The quantizer benchmark's measures equal slow, plain computations."""

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from sidestack.benchmarks.quantizers.baselines import padded, trained
from sidestack.benchmarks.quantizers.measures import cosine_loss, measure, nearest, recall_at, unit, use_of_digits
from sidestack.benchmarks.quantizers.reference import distortion, gaussian_reference

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def random_units(rows: int, dim: int = 12, seed: int = 0) -> Vectors:
    return unit(np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32))


def slow_nearest(vectors: Vectors, query: int, number: int) -> list[int]:
    others = [row for row in range(len(vectors)) if row != query]
    return sorted(others, key=lambda row: -float(vectors[query] @ vectors[row]))[:number]


@dataclass
class Rows:
    training: Vectors
    validation: Vectors
    test: Vectors
    queries: Ids
    truth: Ids


class SignCoder:
    """A code of one bit per dimension that decodes to twice the signs."""

    radix = 2
    prefixes: tuple[int, ...] = (4, 8)
    centre = 0.5
    keeps_length = True

    def __init__(self, dim: int) -> None:
        self.steps = tuple(1.0 + 0.1 * i for i in range(dim))

    def encode(self, x_ND: Vectors) -> Ids:
        return (x_ND > 0).astype(np.int64)

    def decode(self, digits_NK: Ids, prefix: int | None = None) -> Vectors:
        signs = (2 * digits_NK - 1).astype(np.float32)
        signs[:, prefix:] *= prefix is None
        return 2 * signs


@pytest.fixture(scope="module")
def rows() -> Rows:
    test = random_units(300, seed=1)
    queries = np.array([7, 0, 299, 123])
    truth = np.array([slow_nearest(test, query, 20) for query in queries])
    return Rows(random_units(500, seed=2), random_units(40, seed=3), test, queries, truth)


def test_nearest_rows_equal_a_plain_search_without_the_query(rows: Rows) -> None:
    assert np.array_equal(nearest(rows.test, rows.queries, 20), rows.truth)


def test_query_is_left_out_among_equal_rows() -> None:
    equal = np.ones((50, 4), np.float32)
    found = nearest(equal, np.array([49, 3]), 10)
    assert found.shape == (2, 10)
    assert 49 not in found[0]
    assert 3 not in found[1]


def test_recall_is_the_share_of_true_neighbours_found(rows: Rows) -> None:
    found = nearest(random_units(300, seed=9), rows.queries, 100)
    slow = [len(set(t) & set(f)) / 20 for t, f in zip(rows.truth.tolist(), found.tolist(), strict=True)]
    assert recall_at(rows.truth, found) == pytest.approx(np.mean(slow))
    assert recall_at(rows.truth, rows.truth) == 1.0


def test_measures_of_a_sign_code_equal_plain_computations(rows: Rows) -> None:
    coder = SignCoder(12)
    measured = measure(coder, rows)
    signs = np.sign(rows.test)
    cosines = [float(x @ s) / np.sqrt(12) for x, s in zip(rows.test, signs, strict=True)]
    assert measured["cosine_loss"] == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    scale = float(np.mean(np.abs(rows.training).sum(1) / np.sqrt(12)))
    errors = [np.square(x - scale * s / np.sqrt(12)).sum() for x, s in zip(rows.test, signs, strict=True)]
    assert measured["mse"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert measured["mse_as_decoded"] == pytest.approx(np.square(rows.test - 2 * signs).sum(1).mean(), rel=1e-5)
    assert measured["unique_share"] == len({tuple(row) for row in signs.tolist()}) / 300
    assert measured["real_bits"] == 12
    # The signs are the centred digits times a power of two, so both have the same neighbours.
    assert measured["recall_side"] == measured["recall"]
    assert measured["recall_side_steps"] != measured["recall"]


def test_prefix_losses_are_those_of_the_truncated_code(rows: Rows) -> None:
    losses = measure(SignCoder(12), rows)["prefix_losses"]
    assert set(losses) == {4, 8, 12}
    for length, loss in losses.items():
        cut = np.sign(rows.test)
        cut[:, length:] = 0
        assert loss == pytest.approx(cosine_loss(rows.test, cut), abs=1e-6)


def test_use_of_digits_has_entropy_perplexity_and_dead_levels() -> None:
    digits = np.array([[0, 0], [1, 0], [2, 0], [3, 0]])
    use = use_of_digits(digits, 4)
    assert use["entropy_bits"] == pytest.approx([2.0, 0.0])
    assert use["perplexity"] == pytest.approx([4.0, 1.0])
    assert use["dead_levels"] == [0, 3]


@pytest.mark.parametrize("bits", [0.0, 3.0, 24.0, 200.0])
def test_water_filling_of_white_noise_equals_the_closed_form(bits: float) -> None:
    dims, variance = 10, 0.3
    assert distortion(np.full(dims, variance), bits) == pytest.approx(dims * variance * 2 ** (-2 * bits / dims))


@pytest.mark.parametrize("bits", [0.5, 2.0, 7.0, 40.0])
def test_water_filling_equals_a_bisection_over_the_water_level(bits: float) -> None:
    eigenvalues = np.array([4.0, 0.0, 1.0, 0.5, 0.01, 2.0])
    low, high = 1e-12, 4.0
    for _ in range(200):  # bisection over the water level: the rate falls as the level rises
        level = (low * high) ** 0.5
        rate = sum(max(0.0, np.log2(value / level) / 2) for value in eigenvalues if value > 0)
        low, high = (level, high) if rate > bits else (low, level)
    assert distortion(eigenvalues, bits) == pytest.approx(np.minimum(level, eigenvalues).sum(), rel=1e-6)


def test_gaussian_reference_uses_the_corpus_covariance() -> None:
    x = random_units(4000, dim=6)
    mse, loss = gaussian_reference(x, 12)
    assert mse == pytest.approx(2.0 ** (-2 * 12 / 6), rel=0.05)  # nearly white, of total variance 1
    assert loss == pytest.approx(1 - np.sqrt(1 - mse))


@pytest.mark.parametrize("name", ["pq", "opq", "rq_beam1", "rq_beam5", "lsq"])
def test_faiss_code_reconstructs_its_vectors(name: str) -> None:
    x = random_units(1200, dim=10)  # 10 dimensions are not divisible by 3 codes
    coder, seconds = trained(name, 3, x, seed=0)
    digits = coder.encode(x)
    decoded = coder.decode(digits)
    assert seconds > 0
    assert digits.shape == (1200, 3)
    assert 0 <= digits.min() <= digits.max() < 256
    assert decoded.shape == x.shape
    assert cosine_loss(x, decoded) < 0.2


def test_faiss_codes_are_reproducible_by_seed() -> None:
    x = random_units(1000)
    codes = [trained("rq_beam1", 3, x, seed)[0].encode(x) for seed in (0, 0, 1)]
    assert np.array_equal(codes[0], codes[1])
    assert not np.array_equal(codes[0], codes[2])


def test_prefix_of_a_faiss_residual_code_is_the_sum_of_its_first_codewords() -> None:
    x = random_units(1000)
    coder, _ = trained("rq_beam5", 3, x, seed=0)
    digits = coder.encode(x)
    assert coder._sum_of_codewords(digits) == pytest.approx(coder.decode(digits), abs=1e-5)
    losses = [cosine_loss(x, coder.decode(digits, n)) for n in (1, 2, 3)]
    assert all(more > less for more, less in itertools.pairwise(losses))


def test_padding_appends_zeros() -> None:
    x = random_units(5, dim=3)
    assert np.array_equal(padded(x, 2), np.concatenate([x, np.zeros((5, 2), np.float32)], axis=1))
