"""The package of docs/extending, installed: its arm trains and its metric is measured without changes to sidestack."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidestack.infra.code import ROOT
from sidestack.infra.commit import committing
from sidestack.infra.config import digest
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import ConfigError
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.report.config import CompareConfig
from sidestack.pipelines.report.drawing import DARK, LIGHT
from sidestack.ranker.bundle import read_bundle
from sidestack.ranker.constants import read_constants, shaped_constants
from sidestack.ranker.contents import content_kinds
from sidestack.ranker.features import arm_features
from sidestack.ranker.metric_registry import all_metrics
from sidestack.ranker.planner import unsharded_model
from tests.docs.pages import blocks
from tests.ranker.dataset import SIDS, SPEC, write_dataset
from tests.ranker.training import config_with

pytestmark = pytest.mark.slow  # pip takes seconds
EXAMPLE = ROOT / "docs/extending/example"
CONFIG = """
ranker:
  arm: projected
  arms: {projected: {item: projected, history: projected}, none: {}}
  model: {embedding_dim: 8}
  training: {epochs: 1, batch_size: 64, eval_batch_size: 64, validation_days: 0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the installed package, a dataset and a configuration."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(EXAMPLE, folder / "source")  # a build leaves files beside its source
    install = ["install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--target"]
    run([sys.executable, "-m", "pip", *install, str(folder / "installed"), str(source)], {})
    with committing(folder / "dataset", ALONE, stage="materialize") as out:
        write_dataset(out, rows_a_day=128)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def run(command: list[str], environment: Mapping[str, str]) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_package(folder: Path, *command: str) -> str:
    path = os.pathsep.join([str(folder / "installed"), str(ROOT)])
    return run([sys.executable, *command], {"PYTHONPATH": path})


def test_arm_of_the_package_trains_and_its_metric_is_measured(folder: Path) -> None:
    stage = ["--config", str(folder / "config.yaml"), "--input", f"dataset={folder / 'dataset'}"]
    with_package(folder, "-m", "sidestack.ranker.train", *stage, "--out", str(folder / "out"))
    summary = json.loads((folder / "out/summary.json").read_text())
    assert summary["arm"] == "projected"
    predicted = pa.concat_tables(pq.read_table(file) for file in (folder / "out/predictions").glob("*.parquet"))
    differences_N = predicted["p_click"].to_numpy().astype(np.float64) - predicted["click"].to_numpy()
    assert summary["tasks"]["click"]["brier"] == pytest.approx(np.mean(differences_N**2))
    with pytest.raises(ConfigError, match="arms.projected.item: is no kind of content; known are none, .*, hde"):
        read_bundle(folder / "out/model")  # this process does not have the package


def test_arm_is_refused_without_the_package() -> None:
    with pytest.raises(ConfigError, match=r"a\.item: is no kind of content; known are none, .* \(value: 'projected'\)"):
        config_with({"item": "projected"})


@pytest.mark.parametrize(("language", "word", "file"), [
    ("python", "Projected", "sidestack_example/content.py"),
    ("python", "BRIER", "sidestack_example/metric.py"),
    ("toml", "sidestack.contents", "pyproject.toml"),
    ("toml", "sidestack.metrics", "pyproject.toml"),
])  # fmt: skip
def test_the_page_shows_the_code_that_runs(language: str, word: str, file: str) -> None:
    shown = next(text for kind, text in blocks(EXAMPLE.parent / "index.md") if kind == language and word in text)
    lines = iter((EXAMPLE / file).read_text().splitlines())
    for line in filter(None, shown.splitlines()):
        assert any(own.partition("  # ")[0] == line for own in lines), line


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the package importable in this process, as if it were installed from the start."""
    monkeypatch.syspath_prepend(folder / "installed")
    caches = (content_kinds, all_metrics)
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


@pytest.mark.usefixtures("installed")
def test_kind_of_the_package_reads_its_embeddings_and_has_its_colour(folder: Path) -> None:
    features = arm_features(SPEC, config_with({"item": "projected"}), SIDS)
    assert features.constants.embeddings == {"item": SPEC.embeddings}
    assert features.item.embedding_bytes == 16
    assert (LIGHT.kinds["projected"], DARK.kinds["projected"]) == ("#8250df", "#c297ff")


@pytest.mark.usefixtures("installed")
def test_identity_of_a_training_includes_the_code_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = config_with({"item": "projected"}), config_with({"item": "dense"})
    assert [*theirs.identity()["foreign_code"]] == ["sidestack_example"] and "foreign_code" not in ours.identity()
    before = digest(theirs)
    monkeypatch.setattr("sidestack.infra.code.code_digest", lambda *_: "other code")
    assert digest(theirs) != before


@pytest.mark.usefixtures("installed")
def test_identity_of_a_comparison_includes_the_metric_of_the_package() -> None:
    assert CompareConfig().identity()["foreign_metrics"] == ["brier"]
    all_metrics.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sidestack.ranker.metric_registry.with_plugins", lambda _, own: own)
        assert "foreign_metrics" not in CompareConfig().identity()


@pytest.mark.usefixtures("installed")
def test_stored_vectors_equal_those_of_a_new_item_with_the_same_embeddings(folder: Path) -> None:
    features = arm_features(SPEC, config_with({"item": "projected"}), SIDS)
    constants = read_constants(read_dataset(folder / "dataset"), features.constants)
    latent = features.item.latent(constants)
    ids_N = torch.arange(40)
    stored_NF, is_known_N = latent(ids_N[:, None], torch.empty(40, 0))
    assert stored_NF.shape == (40, 8) and 0 < is_known_N.sum() < 40
    new_NF, is_new_known_N = latent.of_embeddings(constants.embeddings["item"][ids_N])
    torch.testing.assert_close(new_NF, stored_NF)
    assert torch.equal(is_new_known_N, is_known_N)


@pytest.mark.usefixtures("installed")
def test_tables_of_the_package_can_be_planned_without_data() -> None:
    config = config_with({"item": "projected", "history": "projected"})
    features = arm_features(SPEC, config, SIDS)
    constants = shaped_constants(features.constants, SPEC)
    omega = unsharded_model(features, config, torch.device("meta"), constants).body.history.content.omega
    assert omega.shape == (8, config.model.embedding_dim)
