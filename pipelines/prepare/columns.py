"""Conversion of NumPy arrays to the contract's Arrow columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]


def days_between(first: date, last: date) -> list[date]:
    """List the days from first to last, both included."""
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row i is `values[offsets_N1[i]:offsets_N1[i + 1]]`."""

    values: npt.NDArray[Any]
    offsets_N1: npt.NDArray[np.int64]

    @classmethod
    def spans(cls, values: npt.NDArray[Any], starts_N: Ints, stops_N: Ints) -> "Ragged":
        """Gather one span of `values` for each row; spans may overlap."""
        offsets_N1 = np.concatenate([[0], np.cumsum(stops_N - starts_N)]).astype(np.int64)
        within = np.arange(offsets_N1[-1]) - np.repeat(offsets_N1[:-1], stops_N - starts_N)
        return cls(values[np.repeat(starts_N, stops_N - starts_N) + within], offsets_N1)

    @classmethod
    def single(cls, values_N: npt.NDArray[Any]) -> "Ragged":
        """Return rows of one value each."""
        return cls(values_N, np.arange(len(values_N) + 1))

    @classmethod
    def masked(cls, values_NK: npt.NDArray[Any], keep_NK: Bools) -> "Ragged":
        """Return the masked entries of each row of a matrix, in order."""
        offsets_N1 = np.concatenate([[0], np.cumsum(keep_NK.sum(axis=1))]).astype(np.int64)
        return cls(values_NK[keep_NK], offsets_N1)

    def arrow(self) -> pa.Array:
        """Return the rows as an Arrow list array."""
        return pa.ListArray.from_arrays(pa.array(self.offsets_N1, pa.int32()), pa.array(self.values))


def nullable(values_N: npt.NDArray[Any], valid_N: Bools) -> pa.Array:
    """Return an Arrow array that is null where not valid."""
    return pa.array(values_N, mask=~valid_N)


def embeddings(values_ND: npt.NDArray[np.floating], valid_N: Bools) -> pa.Array:
    """Return vectors as a fixed-size list array that is null where not valid."""
    flat = pa.array(np.ascontiguousarray(values_ND).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values_ND.shape[1], mask=pa.array(~valid_N))


def table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Assemble columns, arrays or `Ragged`, in the schema's order and types."""
    arrays = [value.arrow() if isinstance(value := columns[name], Ragged) else value for name in schema.names]
    return pa.table(arrays, names=schema.names).cast(schema)
