"""Every reader of Parquet detects a bit that flips after its partition was verified, and names the file."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import CommitError, DataError
from sidestack.infra.footer import read_footer
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.store import Store
from sidestack.ranker.constants import read_constants
from sidestack.ranker.predictions import sorted_predictions, sorting
from sidestack.ranker.preparation import open_splits
from tests.encoder.fabricated import LOCAL, materialize_dataset, train_encoder
from tests.encoder.fabricated import write_dataset as write_encoder_dataset
from tests.pipelines.fabricated import predictions, ranker_output, truth
from tests.ranker.dataset import write_dataset as write_ranker_dataset
from tests.ranker.training import config_of, open_training


def flip(file: Path, column: str) -> None:
    """Flip a bit in a column's last page of the file's first row group."""
    group = read_footer(file).row_group(0)
    chunks = [group.column(number) for number in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(file.read_bytes())
    data[begin + chunk.total_compressed_size - 1] ^= 1
    file.write_bytes(data)


def train(folder: Path) -> None:
    for _ in open_training(folder / "ranker", "side", batch_size=64).epoch(0):
        pass


def read_content(folder: Path) -> None:
    dataset = read_dataset(folder / "ranker")
    fitting, _ = open_splits(dataset, config_of("dense"))
    read_constants(dataset, fitting.features.constants)


def encode(folder: Path) -> None:
    train_encoder(LOCAL, folder / "encoder", folder / "bundle", {"training": {"epochs": 1}})


def materialize(folder: Path) -> None:
    materialize_dataset(LOCAL, folder / "encoder", folder / "trained", folder / "out")


def sort_predictions(folder: Path) -> None:
    with sorting(folder) as database, sorted_predictions(folder / "scored", ("click", "conversion"), database):
        pass


READERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "the ranker's events": (train, "ranker/store/events/date=2024-01-01/*/*.parquet", "item_id"),
    "the ranker's requests": (train, "ranker/store/requests/date=2024-01-01/*/*.parquet", "history_item_ids"),
    "the ranker's labels": (train, "ranker/store/labels/date=2024-01-01/*/*.parquet", "click"),
    "the ranker's content": (read_content, "ranker/store/items/*/*/*.parquet", "words"),
    "the encoder's items": (encode, "encoder/store/items/part=00001/*/part-00000.parquet", "text_embedding"),
    "materialize's items": (materialize, "encoder/store/items/part=00001/*/part-00000.parquet", "text_embedding"),
    "materialize's events": (materialize, "encoder/store/events/date=2024-01-02/*/*.parquet", "item_id"),
    "predictions, which DuckDB sorts": (sort_predictions, "scored/predictions/part-00001.parquet", "p_click"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips")
    write_ranker_dataset(folder / "ranker", rows_a_day=128)
    write_encoder_dataset(folder / "encoder")
    train_encoder(LOCAL, folder / "encoder", folder / "trained", {"training": {"epochs": 1}})
    ranker_output(folder / "scored", "side", predictions(truth(1000), 0.5, 0))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_bit_flip_after_verification_raises_an_error_that_names_the_file(
    folder: Path, tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, pattern, column = READERS[reader]
    for name in ("verify", "verify_partition"):
        monkeypatch.setattr(Dataset, name, lambda *given: None)  # the flip happens after them
    whole = shutil.copytree(folder, tmp_path / "whole")
    read(whole)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (file,) = damaged.glob(pattern)
    flip(file, column)
    with pytest.raises(DataError, match=f"{file}"):
        read(damaged)


def test_file_for_duckdb_or_spark_is_hashed_once_before_reading(tmp_path: Path) -> None:
    write_encoder_dataset(tmp_path)
    dataset = read_dataset(tmp_path)
    (entry, *_) = dataset.partitions("events")
    store = Store(dataset.store)
    file = store.file(entry)
    assert file == dataset.files("events")[0].path
    flip(file, "item_id")
    assert store.file(entry) == file  # a process hashes a file once
    with pytest.raises(CommitError, match=f"{file}: SHA-256"):
        Store(dataset.store).file(entry)
    others = dataset.partitions("events")[1]
    with pytest.raises(CommitError, match="is another partition than was found there before"):
        Store(dataset.store).file(entry.model_copy(update={"path": others.path}))
    with pytest.raises(CommitError, match=f"{file}: SHA-256"):
        dataset.verify(ALONE, [entry])
