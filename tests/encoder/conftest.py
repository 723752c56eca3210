"""Session fixtures: the fabricated dataset, encoders trained on it, the SIDs of one, and its exported model."""

import shutil
from pathlib import Path

import pytest

from sidestack.encoder.bundle import EncoderBundle, load_bundle
from sidestack.encoder.export import Reference, read_reference
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.infra.snapshot import read_dataset
from tests.encoder.exporting import export_encoder
from tests.encoder.fabricated import LOCAL, materialize_dataset, train_encoder, write_dataset
from tests.encoder.sid_tables import OTHER, copied


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture
def fresh(dataset: Path, tmp_path: Path) -> Path:
    """Return a copy of the dataset and its store, without SIDs."""
    return copied(dataset, tmp_path / "dataset")


@pytest.fixture(scope="session")
def encoder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "bundle"
    train_encoder(LOCAL, dataset, out)
    return out


@pytest.fixture(scope="session")
def other_encoder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("other") / "encoder"
    train_encoder(LOCAL, dataset, out, OTHER)
    return out


@pytest.fixture(scope="session")
def materialized(dataset: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("materialized")
    shutil.copytree(dataset, folder / "dataset")
    materialize_dataset(LOCAL, folder / "dataset", encoder, folder / "out")
    return folder / "out"


@pytest.fixture(scope="session")
def exported(encoder: Path, materialized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(URI_VARIABLE, raising=False)
        export_encoder(encoder, materialized, out, {"checked_items": 100})
    return out


@pytest.fixture(scope="session")
def bundle(encoder: Path) -> EncoderBundle:
    return load_bundle(encoder, LOCAL.device)


@pytest.fixture(scope="session")
def reference(materialized: Path, bundle: EncoderBundle) -> Reference:
    """Return all items as a client sends them, and their SIDs in the tables."""
    return read_reference(read_dataset(materialized), bundle, 10_000)
