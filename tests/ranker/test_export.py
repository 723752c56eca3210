"""Stage `ranker_export`: refused inputs and altered versions, narrow tables, and a model without torchrec."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sidestack.infra.code import ROOT
from sidestack.infra.distributed import World
from sidestack.infra.errors import ConfigError, DataError, SidestackError, SpecError
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.ranker.bundle import open_bundle
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.export import _write_constants, export
from sidestack.ranker.export_config import RankerExportConfig
from sidestack.ranker.serving.config import CONSTANTS_FILE, MODEL_FOLDER, SERVED_FILE
from sidestack.ranker.serving.model import ServedRanker
from sidestack.ranker.serving.tables import ServedTable, stored_table
from tests.encoder.fabricated import LOCAL, SPEC, train_encoder
from tests.ranker.exporting import TrainedArms, export_ranker, planted, request_of


def other_file(version: Path) -> None:
    (version / "more").write_text("x")


def flipped(name: str) -> Any:
    def spoil(version: Path) -> None:
        kept = (version / name).read_bytes()
        (version / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))

    return spoil


def other_generation(version: Path) -> None:
    values = json.loads((version / SERVED_FILE).read_text())
    values["sids"]["sid"]["spec"]["fingerprint"] = "ab" * 32
    del values["own_digest"]
    (version / SERVED_FILE).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (flipped("tables.safetensors"), DataError, "tables.safetensors: missing, altered"),
        (flipped("sids/sid.int64"), DataError, "sids/sid.int64: missing, altered"),
        (flipped("encoders/sid/weights.safetensors"), DataError, "encoders/sid/weights.safetensors: missing, altered"),
        (lambda version: (version / "network.safetensors").unlink(), DataError, "network.safetensors: missing"),
        (planted, DataError, "network.pkl: missing, altered, or not of this version"),
        (other_generation, SpecError, "SIDs 'sid' have fingerprint ab"),
    ],
)
def test_altered_missing_or_unexpected_files_are_refused(
    versions: dict[str, Path], tmp_path: Path, spoil: Any, error: type[SidestackError], message: str
) -> None:
    shutil.copytree(versions["side"], tmp_path / "version")
    spoil(tmp_path / "version")
    with pytest.raises(error, match=message):
        ServedRanker(tmp_path / "version")


def test_description_of_another_version_is_refused_naming_its_writer(versions: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(versions["none"], tmp_path / "version")
    values = json.loads((tmp_path / "version" / SERVED_FILE).read_text())
    values["ranker"]["version"] = "9.9"
    del values["own_digest"]
    (tmp_path / "version" / SERVED_FILE).write_text(json.dumps({**values, "shards": 3}))
    with pytest.raises(
        ConfigError, match=r"shards: unknown key.* .value: 3.\nserved\.json: was written by sidestack 9\.9, this is"
    ):
        ServedRanker(tmp_path / "version")


def test_export_from_a_grown_snapshot_keeps_only_rows_that_the_ranker_knows(
    arms: TrainedArms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = torch.ones(SPEC.num_items + 5, 3, dtype=torch.half)
    monkeypatch.setattr("sidestack.ranker.export.read_constants", lambda *_: ModelConstants(embeddings={"item": grown}))
    _write_constants(read_dataset(arms.dataset), open_bundle(arms.rankers["dense"]).description, tmp_path)
    kept = load_file(tmp_path / CONSTANTS_FILE)["embeddings.item"]
    assert kept.shape == (SPEC.num_items, 3)  # the row after them is for unknown items


def test_export_without_the_encoder_or_with_another_one_is_refused(
    arms: TrainedArms, world: World, tmp_path: Path
) -> None:
    config = RankerExportConfig()
    run = StageRun(config, {"model": arms.rankers["side"], "dataset": arms.dataset}, tmp_path, LOCAL, RunLog(None))
    with pytest.raises(DataError, match=r"--input encoder\.sid=DIR: is missing: the arm takes the SIDs 'sid'"):
        export(run)
    train_encoder(LOCAL, arms.encoder.parent / "plain", tmp_path / "other", {"training": {"seed": 3}})
    shutil.rmtree(tmp_path / "version")
    inputs = {**run.inputs, "encoder.sid": tmp_path / "other"}
    with pytest.raises(SpecError, match="the tables were encoded by another encoder"):
        export(StageRun(config, inputs, tmp_path, LOCAL, RunLog(None)))


@pytest.mark.parametrize("tables", ["float16", "int8"])
def test_tables_of_fewer_bits_change_ne_by_a_measured_share(arms: TrainedArms, tmp_path: Path, tables: str) -> None:
    version = export_ranker(arms, "sid_ngram", tmp_path / "out", tables=tables)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["ne"]
    assert found.keys() == {"click"}  # these rows have no conversions
    before, after = found["click"]
    assert 0 < abs(after / before - 1) < 1e-3
    full = arms.rankers["sid_ngram"].parent / "full"
    whole = export_ranker(arms, "sid_ngram", full) if not full.exists() else full / MODEL_FOLDER / "artifacts/version"
    size, all_bits = ((path / "tables.safetensors").stat().st_size for path in (version, whole))
    assert size < (0.55 if tables == "float16" else 0.6) * all_bits


def test_ne_loss_above_the_bound_is_refused(arms: TrainedArms, tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"int8 tables raise the NE of \w+ from .* by more than ranker_export.max_ne_loss=0"
    ):
        for seed in range(3):  # the NE of one arm may fall by chance, but not of all
            export_ranker(arms, ("sid_ngram", "hde", "side")[seed], tmp_path / str(seed), tables="int8", max_ne_loss=0)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_served_table_is_close_to_the_stored_rows(precision: Any) -> None:
    rows_ND = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    rows_ND[7] = 0.25
    table = ServedTable(stored_table(rows_ND, precision))
    bound = {"float32": 0.0, "float16": 1e-3, "int8": float(rows_ND.max() - rows_ND.min()) / 255}[precision]
    assert (table.rows(torch.arange(50)) - rows_ND).abs().max() <= bound
    assert torch.equal(table.rows(torch.tensor([7])), rows_ND[7:8])
    pooled_BD = table.pooled(torch.tensor([3, 4, 9]), torch.tensor([2, 0, 1]))
    one = table.rows(torch.tensor([3, 4, 9]))
    torch.testing.assert_close(pooled_BD, torch.stack([one[0] + one[1], torch.zeros(8), one[2]]))


def test_saved_model_needs_neither_torchrec_nor_training_code(versions: dict[str, Path]) -> None:
    code = f"""
import json, sys
sys.modules.update({{name: None for name in ("torchrec", "fbgemm_gpu", "torchx", "duckdb", "sklearn", "faiss")}})
import mlflow.pyfunc
model = mlflow.pyfunc.load_model({str(versions["side"].parents[1])!r})
print(json.dumps(model.predict([json.loads(sys.argv[1])])))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(request_of())], cwd=versions["side"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout.splitlines()[-1])
    expected = ServedRanker(versions["side"]).answer(request_of(), "r")
    np.testing.assert_allclose(answer["probabilities"]["click"], expected["probabilities"]["click"], atol=1e-6)
    assert not list(versions["side"].parents[1].rglob("*.pkl"))
    code_folder = versions["side"].parents[1] / "code"
    assert [path.name for path in code_folder.iterdir()] == ["sidestack"]
    carried = code_folder / "sidestack"
    assert sorted(path.name for path in carried.iterdir()) == ["__init__.py", "encoder", "infra", "ranker"]
    assert (ROOT / "ranker/serving/model.py").read_bytes() == (carried / "ranker/serving/model.py").read_bytes()
