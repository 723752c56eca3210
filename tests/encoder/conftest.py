"""The fabricated dataset and one encoder trained on it, made once for all tests here."""

from pathlib import Path

import pytest

from tests.encoder.fabricated import LOCAL, train_encoder, write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="session")
def encoder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "bundle"
    train_encoder(LOCAL, dataset, out)
    return out
