"""Rankers over cycles of retraining: SIDs of a refreshed encoder are accepted, those of a rebuilt one are refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.export import export as export_encoder
from sidestack.encoder.export_config import ExportConfig
from sidestack.encoder.sid_map import MAP_FILE
from sidestack.infra.commit import committing
from sidestack.infra.distributed import World
from sidestack.infra.errors import SpecError
from sidestack.infra.manifest import read_manifest
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.ranker.export import export
from sidestack.ranker.export_config import RankerExportConfig
from sidestack.ranker.serving.config import MODEL_FOLDER
from sidestack.ranker.serving.model import ServedRanker
from tests.encoder.fabricated import (
    LOCAL,
    SPEC,
    item_parts,
    item_table,
    materialize_dataset,
    replaced,
    train_encoder,
    write_dataset,
)
from tests.ranker.test_resume import summary, train_ranker, weights
from tests.ranker.test_score import run_score

CPU = torch.device("cpu")
NEW = 50
"""Number of items that the second cycle adds."""
ONCE: dict[str, Any] = {"epochs": 1, "batch_size": 40}


def new_items() -> pa.Table:
    return replaced(item_table().slice(100, NEW), "item_id", pa.array(np.arange(NEW) + SPEC.num_items))


class Cycles:
    """A first cycle, and a second one for each policy, all in one store."""

    def __init__(self, folder: Path, world: World) -> None:
        first = write_dataset(folder / "plain-1", store=folder / "store")
        second = write_dataset(folder / "plain-2", [*item_parts(), new_items()], store=folder / "store")
        self.encoder, self.refreshed, self.rebuilt = (folder / name for name in ("encoder", "refreshed", "rebuilt"))
        train_encoder(LOCAL, first, self.encoder)
        train_encoder(LOCAL, second, self.refreshed, {"training": {"epochs": 4}}, start=self.encoder)
        train_encoder(LOCAL, second, self.rebuilt, {"training": {"seed": 7}})
        self.first, self.kept, self.moved, self.anew = (folder / name for name in ("first", "kept", "moved", "anew"))
        materialize_dataset(LOCAL, first, self.encoder, self.first)
        materialize_dataset(LOCAL, second, self.refreshed, self.kept, published=self.first)
        move = {"published": "move"}
        materialize_dataset(LOCAL, second, self.refreshed, self.moved, move, published=self.first)
        materialize_dataset(LOCAL, second, self.rebuilt, self.anew, published=self.first)
        self.rankers = {arm: folder / arm for arm in ("side", "sid_ngram")}
        for arm, path in self.rankers.items():
            train_ranker(world, self.first, path, arm, **ONCE)


@pytest.fixture(scope="module")
def cycles(world: World, tmp_path_factory: pytest.TempPathFactory) -> Cycles:
    return Cycles(tmp_path_factory.mktemp("cycles"), world)


@pytest.mark.parametrize("arm", ["side", "sid_ngram"])
@pytest.mark.parametrize("policy", ["kept", "moved"])
def test_a_ranker_trains_on_and_scores_sids_of_a_refreshed_encoder(
    cycles: Cycles, world: World, tmp_path: Path, arm: str, policy: str
) -> None:
    dataset, start = getattr(cycles, policy), cycles.rankers[arm]
    train_ranker(world, dataset, tmp_path / "next", arm, start, **ONCE)
    assert summary(tmp_path / "next")["starts_from"]["sids_anew"] is False
    run_score(world, start, dataset, tmp_path / "scored")
    facts = [read_manifest(path).facts["sid_fingerprints"] for path in (start, tmp_path / "next")]
    assert facts[0] == facts[1]


@pytest.mark.parametrize("arm", ["side", "sid_ngram"])
def test_ranker_refuses_sids_of_a_rebuilt_encoder_unless_their_tables_restart(
    cycles: Cycles, world: World, tmp_path: Path, arm: str
) -> None:
    start = cycles.rankers[arm]
    with pytest.raises(SpecError, match="they are another encoder's"):
        run_score(world, start, cycles.anew, tmp_path / "scored")
    with pytest.raises(SpecError, match=r"they are another encoder's; ranker\.training\.start_sids=anew"):
        train_ranker(world, cycles.anew, tmp_path / "same", arm, start, **ONCE)
    low_rates = {**ONCE, "sparse_learning_rate": 1e-12, "dense_learning_rate": 1e-12}
    train_ranker(world, cycles.anew, tmp_path / "anew", arm, start, start_sids="anew", **low_rates)
    assert summary(tmp_path / "anew")["starts_from"]["sids_anew"] is True
    before, after = weights(start), weights(tmp_path / "anew")
    (name,) = (one for one in before if one.startswith("model.") and one.endswith("t_user_id.weight"))
    torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)  # a table without SIDs is kept
    if arm == "sid_ngram":
        (name, *_) = (one for one in before if one.startswith("model.") and "t_item_sid" in one)
        assert not torch.allclose(after[name], before[name], atol=1e-6)
    run_score(world, start, cycles.first, tmp_path / "old")  # the old generation remains usable


def exported(cycles: Cycles, dataset: Path, encoder: Path, out: Path) -> ServedRanker:
    inputs = {"model": cycles.rankers["side"], "dataset": dataset, "encoder.sid": encoder}
    with pytest.MonkeyPatch.context() as patch, committing(out, LOCAL, stage="ranker_export") as staging:
        patch.delenv(URI_VARIABLE, raising=False)
        log = RunLog.open(0, "ranker_export", staging, {}, {}, "", None)
        export(StageRun(RankerExportConfig(checked_rows=100), inputs, staging, LOCAL, log))
    return ServedRanker(out / MODEL_FOLDER / "artifacts" / "version")


def signals_of(item: int) -> dict[str, Any]:
    (row,) = item_table().slice(item, 1).to_pylist()
    names = [name for name in (*SPEC.embeddings, *SPEC.categoricals) if row[name] is not None]
    return {name: list(map(float, row[name])) if name in SPEC.embeddings else row[name] for name in names}


def test_a_served_version_has_the_published_map_and_the_refreshed_encoder(cycles: Cycles, tmp_path: Path) -> None:
    served = exported(cycles, cycles.kept, cycles.refreshed, tmp_path / "out")
    dataset = read_dataset(cycles.kept)
    parts = dataset.partitions(dataset.snapshot.sids["sid"].table("sid", "items"))
    published = np.concatenate([np.fromfile(dataset.store / part.path / MAP_FILE, np.int64) for part in parts])
    ids = np.arange(SPEC.num_items + NEW)
    assert served._sids["sid"].of(ids)[:, 0].tolist() == published.tolist()
    likes = list(range(100, 100 + NEW))
    found = served._sids["sid"].encoded([signals_of(like) for like in likes], ["item"] * NEW)[:, 0]
    assert found.tolist() == published[SPEC.num_items :].tolist()  # new items with these signals, by the same encoder
    assert found.tolist() != published[100 : 100 + NEW].tolist()
    bundle = load_bundle(cycles.refreshed, CPU)
    assert served.config.lineage["revision.sid"] == served.config.sids["sid"].revision == bundle.revision
    assert served.config.sids["sid"].spec.fingerprint == bundle.spec.fingerprint != bundle.revision


def test_export_with_an_encoder_of_another_generation_is_refused(cycles: Cycles, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the tables were encoded by another encoder"):
        exported(cycles, cycles.kept, cycles.rebuilt, tmp_path / "out")


def run_encoder_export(encoder: Path, sids: Path, out: Path) -> Mapping[str, Any]:
    facts: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, committing(out, LOCAL, stage="export", facts=facts) as staging:
        patch.delenv(URI_VARIABLE, raising=False)
        log = RunLog.open(0, "export", staging, {}, {}, "", None)
        export_encoder(StageRun(ExportConfig(), {"encoder": encoder, "sids": sids}, staging, LOCAL, log, facts))
    found: Mapping[str, Any] = json.loads((out / "summary.json").read_text())
    return {**found, **facts}


def test_encoder_export_is_checked_only_against_sids_of_its_revision(cycles: Cycles, tmp_path: Path) -> None:
    kept = run_encoder_export(cycles.refreshed, cycles.kept, tmp_path / "kept")
    assert kept["checked_items"] == NEW
    assert kept["revision"] == load_bundle(cycles.refreshed, CPU).revision != kept["fingerprint"]
    moved = run_encoder_export(cycles.refreshed, cycles.moved, tmp_path / "moved")
    assert moved["checked_items"] > NEW
    with pytest.raises(SpecError, match=r"no SID is of the encoder's revision .*materialize\.published=move"):
        run_encoder_export(cycles.refreshed, cycles.first, tmp_path / "none")
