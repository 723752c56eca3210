"""Ragged rows and counter-based draws against plain loops."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sidestack.pipelines.prepare.columns import Ragged, embeddings
from sidestack.pipelines.prepare.hashing import below, mixed, uniform


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted)))
def test_spans_equal_slicing(spans: list[list[int]]) -> None:
    values = np.arange(100, 109)
    starts_N, stops_N = np.array(spans, np.int64).reshape(-1, 2).T
    made = Ragged.spans(values, starts_N, stops_N).arrow().to_pylist()
    assert made == [values[start:stop].tolist() for start, stop in spans]


def test_masked_keeps_rows_and_order() -> None:
    keep_NK = np.array([[True, False, True], [False, False, False], [True, True, True]])
    assert Ragged.masked(np.arange(9).reshape(3, 3), keep_NK).arrow().to_pylist() == [[0, 2], [], [6, 7, 8]]


def test_embeddings_are_null_where_not_valid() -> None:
    made = embeddings(np.arange(6, dtype=np.float16).reshape(3, 2), np.array([True, False, True]))
    assert made.to_pylist() == [[0, 1], None, [4, 5]]


@given(st.integers(0, 2**40), st.integers(-(2**40), 2**40), st.integers(0, 50))
def test_draw_depends_only_on_its_own_keys(seed: int, start: int, number: int) -> None:
    keys = start + np.arange(number)
    together = uniform(seed, keys)
    assert ((together >= 0) & (together < 1)).all()
    assert together.tolist() == [uniform(seed, int(key))[0] for key in keys]


def test_draws_are_even_and_independent() -> None:
    draws = below(10, 5, np.arange(100_000))
    assert (abs(np.bincount(draws) - 10_000) < 500).all()
    assert abs(np.corrcoef(uniform(1, np.arange(50_000)), uniform(2, np.arange(50_000)))[0, 1]) < 0.02
    assert len(np.unique(mixed(np.arange(300)[:, None], np.arange(300)))) == 90_000
    assert (mixed(1, 2) != mixed(2, 1)).all()
