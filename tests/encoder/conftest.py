"""Session fixtures: the fabricated dataset, an encoder trained on it, and the SIDs that it assigns."""

import shutil
from pathlib import Path

import pytest

from tests.encoder.fabricated import LOCAL, materialize_dataset, train_encoder, write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="session")
def encoder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "bundle"
    train_encoder(LOCAL, dataset, out)
    return out


@pytest.fixture(scope="session")
def materialized(dataset: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("materialized")
    shutil.copytree(dataset, folder / "dataset")
    materialize_dataset(LOCAL, folder / "dataset", encoder, folder / "out")
    return folder / "out"
