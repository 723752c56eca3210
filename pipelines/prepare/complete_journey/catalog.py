"""The catalogue and the households as tables of ids, with human-readable vocabularies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.pipelines.prepare.columns import Ragged

Ints = npt.NDArray[np.int64]

ITEM_SIGNALS = {
    "department": "department",
    "category": "product_category",
    "type": "product_type",
    "brand": "brand",
    "manufacturer": "manufacturer_id",
}
"""Categorical signal -> column of the source."""
DEMOGRAPHICS = (
    "age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """Ids of a categorical column.

    Attributes:
        ids: int32, null where the source is null. Ids are by descending frequency, ties by name.
        names: what the ids stand for. counts: how often each occurs.
    """

    ids: pa.Array
    names: list[str]
    counts: list[int]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "Vocabulary":
        """Number the values of a column; empty text counts as null."""
        text = column.cast(pa.string()).combine_chunks()
        text = pc.if_else(pc.equal(text, ""), None, text)
        counted = {entry["values"]: entry["counts"] for entry in pc.value_counts(text.drop_null()).to_pylist()}
        names = sorted(counted, key=lambda name: (-counted[name], name))
        ids = pc.index_in(text, pa.array(names, pa.string()), skip_nulls=True).cast(pa.int32())
        return cls(ids, names, [counted[name] for name in names])

    def table(self) -> pa.Table:
        """Return a human-readable table of id, value and count."""
        return pa.table({
            "id": pa.array(range(len(self.names)), pa.int32()),
            "value": pa.array(self.names, pa.string()),
            "count": pa.array(self.counts, pa.int64()),
        })  # fmt: skip


def item_vocabularies(products: pa.Table) -> dict[str, Vocabulary]:
    """Number the items' categorical signals."""
    return {signal: Vocabulary.of(products[column]) for signal, column in ITEM_SIGNALS.items()}


def user_vocabularies(demographics: pa.Table, households: Ints) -> dict[str, Vocabulary]:
    """Number the households' demographics, one row each; most rows are all null."""
    rows = pc.index_in(pa.array(households), demographics["household_id"].combine_chunks())
    return {name: Vocabulary.of(demographics[name].take(rows)) for name in DEMOGRAPHICS}


def demographics_ids(vocabularies: Mapping[str, Vocabulary]) -> tuple[Ragged, int]:
    """Return each user's known demographics as ids in one id space, with a block per column, and the space's size."""
    offset, offsets = 0, []
    for vocabulary in vocabularies.values():
        offsets.append(offset)
        offset += len(vocabulary.names)
    ids_UK = np.stack(
        [vocabulary.ids.fill_null(-1).to_numpy().astype(np.int64) for vocabulary in vocabularies.values()], axis=1
    )
    return Ragged.masked(ids_UK + np.array(offsets), ids_UK >= 0), offset


def texts(products: pa.Table) -> list[str]:
    """Describe each product in a few words: category, type, package size, department, brand."""
    columns = ("product_category", "product_type", "package_size", "department", "brand")
    words = [[_clean(value) for value in products[name].to_pylist()] for name in columns]
    return [_text(*row) for row in zip(*words, strict=True)]


def _clean(value: str | None) -> str:
    return " ".join((value or "").lower().split())


def _text(category: str, kind: str, size: str, department: str, brand: str) -> str:
    what = category if kind == category else f"{category}: {kind}".strip(": ")
    return ", ".join(_present([what, size, department, f"{brand} brand" if brand else ""]))


def _present(words: Sequence[str]) -> list[str]:
    return [word for word in words if word]
