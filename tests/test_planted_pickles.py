"""A pickle in place of any loaded file is refused or ignored; its code never runs."""

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sidestack.benchmarks.quantizers.corpora import Corpus
from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.sid_codebook import FOLDER as CODEBOOKS
from sidestack.encoder.sid_codebook import read_codebook
from sidestack.infra.checkpoint import Checkpoint, Checkpoints
from sidestack.infra.config import Config, digest, load_file
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import SidestackError
from sidestack.infra.files import hash_all
from sidestack.infra.impressions import read_impressions
from sidestack.infra.manifest import MANIFEST, verify
from sidestack.infra.sealed import OWN_DIGEST
from sidestack.infra.served import load_served, save_served
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.retrain.ledger import CYCLES, OUTCOME_FILE, PLAN_FILE, Ledger
from sidestack.ranker.bundle import DESCRIPTION_FILE, read_bundle
from sidestack.ranker.serving.model import read_config as read_served
from tests.datasets import write_snapshot_of
from tests.encoder.fabricated import LOCAL, train_encoder, write_dataset
from tests.infra.made_up import DAYS, SPEC, requests, table

CPU = torch.device("cpu")


class Marking:
    """An object that writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "unpickled"


@pytest.fixture
def pickles(marker: Path, tmp_path: Path) -> dict[str, bytes]:
    """Return pickles that write the marker when loaded: a plain one, one saved by torch and one saved by numpy."""
    torch.save({"weight": Marking(marker)}, tmp_path / "torch")
    np.save(tmp_path / "numpy.npy", np.array([Marking(marker)], dtype=object), allow_pickle=True)
    files = {"torch": tmp_path / "torch", "numpy": tmp_path / "numpy.npy"}
    return {"plain": pickle.dumps(Marking(marker)), **{name: file.read_bytes() for name, file in files.items()}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def encoder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "bundle"
    train_encoder(LOCAL, dataset, out)
    return out


class Settings(Config):
    rate: float = 0.1


def checkpoints(path: Path) -> Checkpoints:
    return Checkpoints(path, ALONE, "encoder", {"key": "k"}, Settings())


def resealed(path: Path) -> None:
    """Update a manifest's hashes to its files' present content, as an attacker with write access can."""
    file = path / MANIFEST
    with suppress(ValueError):  # the manifest is the planted pickle
        manifest = json.loads(file.read_bytes()) if file.is_file() else {"files": {}}
        for name, sha256 in hash_all(path, [name for name in manifest["files"] if (path / name).is_file()]).items():
            manifest["files"][name] |= {"sha256": sha256, "bytes": (path / name).stat().st_size}
        if manifest.pop(OWN_DIGEST, None) is not None:
            manifest[OWN_DIGEST] = digest(manifest)
        if file.is_file():
            file.write_text(json.dumps(manifest))


def plant_everywhere(root: Path, pickles: dict[str, bytes], load: Callable[[], object], marker: Path) -> set[str]:
    """Replace each file by each pickle in turn and load; return the names of the files with which loading failed."""
    refused = set()
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        before = {path: path.read_bytes() for path in (file, file.parent / MANIFEST, root / MANIFEST) if path.is_file()}
        for content_ in pickles.values():
            file.write_bytes(content_)
            resealed(root)
            try:
                load()
            except SidestackError:
                refused.add(file.name)
            assert not marker.exists(), f"{file} was unpickled"
            for path, old in before.items():
                path.write_bytes(old)
    for name in ("model.pkl", "weights.pt", "__init__.pickle"):  # additional files
        (root / name).write_bytes(pickles["torch"])
    with suppress(SidestackError):
        load()
    assert not marker.exists()
    return refused


def test_planted_pickles_run_when_unpickled(pickles: dict[str, bytes], marker: Path, tmp_path: Path) -> None:
    for number, (name, load) in enumerate(
        {
            "plain": pickle.loads,
            "torch": lambda _: torch.load(tmp_path / "torch", weights_only=False),
            "numpy": lambda _: np.load(tmp_path / "numpy.npy", allow_pickle=True),
        }.items()
    ):
        load(pickles[name])
        assert marker.exists(), number
        marker.unlink()


def test_encoder_bundle_refuses_pickles(encoder: Path, pickles: dict[str, bytes], marker: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(encoder, tmp_path / "bundle"))
    refused = plant_everywhere(copy, pickles, lambda: (verify(copy), load_bundle(copy, CPU)), marker)
    assert {"encoder.json", "weights.safetensors", MANIFEST} <= refused


def test_checkpoint_refuses_pickles(pickles: dict[str, bytes], marker: Path, tmp_path: Path) -> None:
    kept = checkpoints(tmp_path / "out.checkpoint")
    kept.save(Checkpoint(1, {"table": torch.zeros(2)}, {"own": torch.zeros(1)}, {"rate": 0.5}))
    (step,) = kept.path.iterdir()
    refused = plant_everywhere(step, pickles, lambda: checkpoints(kept.path).load(), marker)
    assert refused == {path.name for path in step.iterdir()} - {"model.pkl", "weights.pt", "__init__.pickle"}


def test_snapshot_and_partitions_refuse_pickles(pickles: dict[str, bytes], marker: Path, tmp_path: Path) -> None:
    days = {day: table(requests(day, [2, 1])) for day in DAYS}
    path = write_snapshot_of(tmp_path / "snapshot", SPEC, days=days)

    def load() -> None:
        found = read_dataset(path)
        found.verify(ALONE, found.snapshot.partitions)
        list(read_impressions(found, ["item_id", "click"]))

    load()
    refused = plant_everywhere(path, pickles, load, marker)
    assert {"dataset.json", "snapshot.json", "part-00000.parquet", MANIFEST} <= refused


def test_codebook_refuses_pickles(encoder: Path, pickles: dict[str, bytes], marker: Path, tmp_path: Path) -> None:
    spec = load_bundle(encoder, CPU).spec
    (tmp_path / CODEBOOKS).mkdir()
    for content_ in pickles.values():
        (tmp_path / CODEBOOKS / f"{spec.name}.safetensors").write_bytes(content_)
        with pytest.raises(SidestackError):
            read_codebook(tmp_path, spec)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("names", "load"),
    [
        ([DESCRIPTION_FILE], read_bundle),
        (["served.json"], read_served),
        (["dataset.json", "snapshot.json"], read_dataset),
        ([f"{CYCLES}/0001/{PLAN_FILE}", f"{CYCLES}/0001/{OUTCOME_FILE}"], Ledger),
        (["run.yaml"], lambda path: load_file(path / "run.yaml")),
        ([MANIFEST], verify),
    ],
)
def test_descriptions_refuse_pickles(
    names: list[str], load: Callable[[Path], object], pickles: dict[str, bytes], marker: Path, tmp_path: Path
) -> None:
    root = tmp_path / "made"
    for content_ in pickles.values():
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content_)
        with pytest.raises(SidestackError):
            load(root)
    assert not marker.exists()


def test_yaml_tags_create_no_objects(marker: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for tag in ("object/apply", "object/new"):
        file.write_text(f"encoder: !!python/{tag}:pathlib.Path.touch [!!python/{tag}:pathlib.Path [{marker}]]\n")
        with pytest.raises(SidestackError, match="could not determine a constructor"):
            load_file(file)
        with pytest.raises(SidestackError):
            load_file(None, [f"encoder={file.read_text()[9:]}"])
    assert not marker.exists()


def test_benchmark_corpus_does_not_unpickle_arrays(pickles: dict[str, bytes], tmp_path: Path, marker: Path) -> None:
    for content_ in pickles.values():
        (tmp_path / "queries.npy").write_bytes(content_)
        with suppress(ValueError, EOFError):  # an archive is opened without loading its members
            _ = Corpus("made", tmp_path).queries
    assert not marker.exists()


@pytest.mark.slow
def test_mlflow_model_refuses_a_pickle(pickles: dict[str, bytes], marker: Path, tmp_path: Path) -> None:
    """MLflow itself would load a pickle that MLmodel names in place of code."""
    from mlflow.exceptions import MlflowException

    code = tmp_path / "code.py"
    code.write_text(
        "from mlflow.models import set_model\nfrom mlflow.pyfunc import PythonModel\n\n\n"
        "class Echo(PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n        return model_input\n"
        "\n\nset_model(Echo())\n"
    )
    model = tmp_path / "model"
    save_served(model, code, "code:answers", {}, [], {})
    assert load_served(model).predict([1]) == [1]
    described = yaml.safe_load((model / "MLmodel").read_text())
    flavor = described["flavors"]["python_function"]
    del flavor["model_code_path"]
    flavor["python_model"] = "python_model.pkl"
    (model / "MLmodel").write_text(yaml.safe_dump(described))
    for content_ in pickles.values():
        (model / "python_model.pkl").write_bytes(content_)
        with pytest.raises(MlflowException, match="pickle is disallowed"):
            load_served(model)
    assert not marker.exists()
