"""Stage `export`: the committed model, its check against the SIDs of the tables, and refused inputs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sidestack.encoder.bundle import EncoderBundle, load_bundle
from sidestack.encoder.export import MODEL_FOLDER, Reference, check_model, read_reference
from sidestack.encoder.export_config import ExportConfig
from sidestack.infra.code import ROOT
from sidestack.infra.config import parse
from sidestack.infra.errors import CommitError, ConfigError, SpecError
from sidestack.infra.manifest import verify
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.infra.served import requirements
from sidestack.infra.snapshot import read_dataset
from tests.encoder.exporting import export_encoder
from tests.encoder.fabricated import (
    LOCAL,
    item_parts,
    item_table,
    materialize_dataset,
    replaced,
    train_encoder,
    write_dataset,
)

CPU = torch.device("cpu")


def test_committed_export_is_complete_and_has_no_pickle(exported: Path, bundle: EncoderBundle) -> None:
    manifest = verify(exported)
    names = {
        Path(name).relative_to(MODEL_FOLDER).as_posix() for name in manifest.files if name.startswith(MODEL_FOLDER)
    }
    assert {
        "artifacts/weights.safetensors",
        "artifacts/encoder.json",
        "served_model.py",
        "code/sidestack/encoder/sid/spec.py",
    } <= names
    assert {Path(name).suffix for name in names} <= {"", ".py", ".json", ".yaml", ".txt", ".safetensors"}
    assert not any("deploy" in name for name in names)
    summary = json.loads((exported / "summary.json").read_text())
    assert summary["served"]["spec"]["fingerprint"] == bundle.spec.fingerprint
    assert (summary["checked_items"], summary["registered"]) == (100, None)


def test_requirements_are_pinned(exported: Path) -> None:
    pinned = (ROOT / "requirements/constraints.txt").read_text() + (ROOT / "requirements/torch.txt").read_text()
    expected = {line.strip().lower() for line in pinned.splitlines()}
    lines = (exported / MODEL_FOLDER / "requirements.txt").read_text().splitlines()
    assert lines == requirements()
    assert {line.lower() for line in lines} <= expected
    assert not any("torchrec" in line or "fbgemm" in line for line in lines)


def test_server_runs_the_exported_code_and_imports_no_training_code(exported: Path, tmp_path: Path) -> None:
    program = f"""
import sys, mlflow.pyfunc
model = mlflow.pyfunc.load_model({str(exported / MODEL_FOLDER)!r})
print(model.predict([{{"brand": 3}}])[0]["digits"] is not None)
print(sys.modules["sidestack.encoder.serving"].__file__)
heavy = {{"torchrec", "fbgemm_gpu", "faiss", "torchx", "sidestack.ranker", "sidestack.pipelines", "encoder"}}
print(sorted(heavy & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    answered, file, heavy = ran.stdout.splitlines()
    assert answered == "True"
    assert file == str(exported / MODEL_FOLDER / "code/sidestack/encoder/serving.py")
    assert heavy == "[]"


def test_sids_of_another_encoder_are_refused(dataset: Path, materialized: Path, tmp_path: Path) -> None:
    train_encoder(LOCAL, dataset, tmp_path / "other", {"training": {"epochs": 1, "seed": 5}})
    with pytest.raises(SpecError, match="the tables were encoded by another encoder"):
        export_encoder(tmp_path / "other", materialized, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tables_without_sids_are_refused(dataset: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="has no SIDs 'sid'; input sids is what materialize commits"):
        export_encoder(encoder, dataset, tmp_path / "out")


@pytest.mark.parametrize("table", ["items", "their SIDs"])
def test_altered_partition_is_refused(materialized: Path, encoder: Path, tmp_path: Path, table: str) -> None:
    folder = Path(shutil.copytree(materialized.parent, tmp_path / "copy"))
    dataset = read_dataset(folder / materialized.name)
    name = table if table == "items" else dataset.snapshot.sids["sid"].table("sid", "items")
    file = dataset.files(name)[0].path
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CommitError, match=re.escape(f"{file}: SHA-256")):
        export_encoder(encoder, folder / materialized.name, tmp_path / "out")


def test_reference_of_a_revised_item_is_the_row_that_its_published_sid_encodes(
    dataset: Path, encoder: Path, tmp_path: Path
) -> None:
    new = replaced(item_table().slice(0, 20), "item_id", pa.array(np.arange(700, 720)))
    changed = replaced(item_table().slice(50, 9), "item_id", pa.array(np.arange(9)))
    grown = write_dataset(tmp_path / "grown", [*item_parts(), pa.concat_tables([changed, new])])
    materialize_dataset(LOCAL, grown, encoder, tmp_path / "sids")
    found = read_reference(read_dataset(tmp_path / "sids"), load_bundle(encoder, CPU), 10_000)
    assert len(found.items) == len(found.answers) == 720
    assert found.items[:9] != changed.drop_columns(["item_id", "text"]).to_pylist()
    assert found.answers[700:] == found.answers[:20]


def test_model_with_other_sids_than_the_tables_is_refused(exported: Path, reference: Reference) -> None:
    answers = [dict(answer) for answer in reference.answers]
    answers[300]["sid"] = (answers[300]["sid"] + 1) % 729
    altered = Reference(reference.items, answers, reference.spec, reference.stored)
    with pytest.raises(SpecError, match=r"item 300: the saved model gives SID \[\d+\], the tables hold \[\d+\]"):
        check_model(exported / MODEL_FOLDER, altered, max_items=128)


def test_missing_registry_is_logged_and_the_model_is_not_registered(
    encoder: Path,
    materialized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    export_encoder(encoder, materialized, tmp_path / "out", {"checked_items": 1})
    assert f"not registered as sidestack-encoder: {URI_VARIABLE} is not set" in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"alias": "1"}, {"alias": "a/b"}, {"registered_model": "a/b"}, {"max_items": 0}])
def test_invalid_export_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"export.{next(iter(values))}"):
        parse(ExportConfig, values, "export")
