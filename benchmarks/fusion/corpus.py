"""The items that the encoders of the fusion benchmark are trained on, selected from a prepared dataset.

The encoder holds items out by a hash of their number. Many items of the default data share a text, so the rows are
numbered in an order that puts all items of one text on the same side of that split.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sidestack.benchmarks.items import ALONE, read_items
from sidestack.encoder.holdout import held_out
from sidestack.infra.commit import committing
from sidestack.infra.config import digest
from sidestack.infra.errors import DataError
from sidestack.infra.manifest import is_committed, read_manifest
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.store import Store, write_items
from sidestack.infra.tables import item_schema
from sidestack.pipelines.prepare.contract import STORE

SEED = 0
"""Seed of the order of texts, and so of the held-out items; it does not depend on the encoders' seeds."""

Rows = npt.NDArray[np.int64]


class Choice(Protocol):
    """A function that chooses rows of an items table by the signals they have."""

    __name__: str

    def __call__(self, table: pa.Table, names: tuple[str, ...]) -> Rows:
        """Return the rows' numbers, [N]."""


def paired(table: pa.Table, names: tuple[str, ...]) -> Rows:
    """Choose the items that have all of the named signals."""
    has_all = np.logical_and.reduce([_has(table, name) for name in names])
    return np.flatnonzero(has_all)


def distinct(table: pa.Table, names: tuple[str, ...]) -> Rows:
    """Choose one item per text: the first with the most of the named signals."""
    number = np.sum([_has(table, name) for name in names], axis=0)
    order = np.argsort(-number, kind="stable")
    _, first = np.unique(text_groups(table)[order], return_index=True)
    return np.sort(order[first])


def text_groups(table: pa.Table) -> Rows:
    """Number the texts of items, [N]; an item without a text has a number of its own."""
    texts = [f"{row}" if text is None else f"={text}" for row, text in enumerate(table["text"].to_pylist())]
    return np.unique(texts, return_inverse=True)[1].astype(np.int64)


def arranged(groups_N: Rows, share: float) -> Rows:
    """Order items so that the encoder holds out either all or none of a group.

    Args:
        groups_N: the items' groups, [N].
        share: the share of the items to hold out.

    Returns:
        items in their new order, [at most N]: a few items that no order can place may be left out.
    """
    rng = np.random.default_rng(SEED)
    slots_N = held_out(np.arange(len(groups_N)), share)
    labels, sizes = np.unique(groups_N, return_counts=True)
    shuffled = rng.permutation(len(labels))
    last = int(np.searchsorted(sizes[shuffled].cumsum(), slots_N.sum()))
    is_held_N = np.isin(groups_N, labels[shuffled[: last + 1]])
    items = rng.permutation(len(groups_N))
    held, others = items[is_held_N[items]], items[~is_held_N[items]]
    fits_N = (slots_N.cumsum() <= len(held)) & ((~slots_N).cumsum() <= len(others))
    slots_M = slots_N[: int(fits_N.sum())]
    order_M = np.empty(len(slots_M), np.int64)
    order_M[slots_M], order_M[~slots_M] = held[: slots_M.sum()], others[: (~slots_M).sum()]
    return order_M


def write_corpus(
    cache: Path, source: Path, choice: Choice, names: tuple[str, ...], share: float, rows: int | None
) -> Path:
    """Commit the chosen items as a dataset with items only; an existing one is reused.

    Args:
        cache: the directory to commit below.
        source: the prepared dataset.
        choice: chooses rows of its items table, `paired` or `distinct`. names: the signals to choose by.
        share: the share of the items that will be held out.
        rows: maximum number of items; None for all.

    Returns:
        the committed directory.

    Raises:
        DataError, CommitError: the dataset is invalid, or no item is left of it.
    """
    name = choice.__name__
    made_of = {"source": read_manifest(source).digest, "choice": name, "of": names, "share": share, "rows": rows}
    out = cache / f"corpus-{name}-{digest(made_of)[:12]}"
    if is_committed(out):
        return out
    dataset = read_dataset(source)
    table = read_items(dataset, item_schema(dataset.spec).names)
    chosen = choice(table, names)
    chosen = np.random.default_rng(SEED).permutation(chosen)[:rows]
    chosen = chosen[arranged(text_groups(table.take(chosen)), share)]
    if not len(chosen):
        raise DataError(f"{source}: no item is left for the corpus {name!r}")
    spec = dataset.spec.model_copy(update={"num_items": len(chosen)})
    renumbered = table.take(chosen).set_column(0, "item_id", pa.array(np.arange(len(chosen))))
    with committing(out, ALONE, stage="corpus", facts=made_of) as staging:
        write_items(Store(cache / STORE), staging, spec, digest(made_of), renumbered.schema, [renumbered])
    return out


def _has(table: pa.Table, name: str) -> npt.NDArray[np.bool_]:
    return np.asarray(table[name].is_valid().to_numpy())
