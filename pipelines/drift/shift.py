"""The population stability index (PSI): how far the distribution of a column has moved.

PSI = sum over bins of (p - q) ln(p / q), p and q being the shares of new and of earlier rows in a bin. By convention,
below 0.1 is no shift and above 0.25 a large one.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.tables import DatasetSpec

CATEGORIES = 100
"""Number of most frequent ids of a sparse column with a bin each; all others share one bin."""
LEAST_SHARE = 1e-4
"""Lower bound on a bin's share: otherwise the logarithm of 0 would let one row decide."""

_EMPTY = -1
"""Placeholder for an empty list; ids are never negative."""


def column_shifts(earlier: pa.Table, new: pa.Table, spec: DatasetSpec) -> dict[str, float]:
    """Return the PSI of every dense and sparse column; both samples must have a row."""
    dense = {name: dense_psi(*(_numbers(table, name) for table in (earlier, new))) for name in spec.all_dense}
    sparse = {name: sparse_psi(*(_ids(table, name) for table in (earlier, new))) for name in spec.all_sparse}
    return dense | sparse


def dense_psi(earlier_N: npt.NDArray[np.float64], new_M: npt.NDArray[np.float64]) -> float:
    """Return the PSI of numbers, in bins whose upper edges are the deciles of the earlier numbers.

    Numbers below the earlier minimum have a bin of their own, so that a shift of a constant column shows.
    """
    deciles = np.quantile(earlier_N, np.arange(1, 10) / 10)
    edges = np.unique([np.nextafter(earlier_N.min(), -np.inf), *deciles])
    earlier_B, new_B = (
        np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) for values in (earlier_N, new_M)
    )
    return _psi(earlier_B, new_B)


def sparse_psi(earlier_N: npt.NDArray[np.int64], new_M: npt.NDArray[np.int64]) -> float:
    """Return the PSI of ids, in bins of the `CATEGORIES` most frequent earlier ids and one for the rest."""
    ids_C, counts_C = np.unique(earlier_N, return_counts=True)
    kept_C = np.sort(ids_C[np.argsort(-counts_C, kind="stable")[:CATEGORIES]])
    earlier_B, new_B = (_counted(values, kept_C) for values in (earlier_N, new_M))
    return _psi(earlier_B, new_B)


def _counted(ids_N: npt.NDArray[np.int64], kept_C: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count each kept id, and then all others together."""
    place_N = np.searchsorted(kept_C, ids_N).clip(max=len(kept_C) - 1)
    place_N[kept_C[place_N] != ids_N] = len(kept_C)
    return np.bincount(place_N, minlength=len(kept_C) + 1)


def _psi(earlier_B: npt.NDArray[np.int64], new_B: npt.NDArray[np.int64]) -> float:
    q_B, p_B = (np.maximum(counts / counts.sum(), LEAST_SHARE) for counts in (earlier_B, new_B))
    return float(((p_B - q_B) * np.log(p_B / q_B)).sum())


def _numbers(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = table[name].to_numpy().astype(np.float64)
    return values


def _ids(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """Return the ids of all rows, and `_EMPTY` for each row without one."""
    column = table[name]
    empty = pc.sum(pc.equal(pc.list_value_length(column), 0)).as_py()
    return np.concatenate([pc.list_flatten(column).to_numpy(), np.full(empty, _EMPTY)])
