"""Run a small instance of every stage in one folder, for tests that damage, copy or repeat outputs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sidestack.encoder.export import export as export_encoder
from sidestack.encoder.export_config import ExportConfig
from sidestack.infra.checkpoint import Checkpoints
from sidestack.infra.commit import committing
from sidestack.infra.config import Config, parse
from sidestack.infra.distributed import ALONE, World
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.compare import compare
from sidestack.pipelines.report.config import CompareConfig
from sidestack.ranker.baseline.config import BaselineConfig
from sidestack.ranker.baseline.stage import run_baseline
from sidestack.ranker.export import export as export_ranker
from sidestack.ranker.export_config import RankerExportConfig
from sidestack.ranker.score import score
from sidestack.ranker.score_config import ScoreConfig
from tests.encoder.fabricated import materialize_dataset, train_encoder, write_dataset
from tests.pipelines.prepare.running import run_prepare
from tests.ranker.test_resume import train_ranker

SYNTHETIC = {
    "kind": "synthetic", "num_items": 300, "num_users": 50, "events_per_day": 200, "train_days": 3, "test_days": 2
}  # fmt: skip


def make_run(folder: Path, world: World, compared: Mapping[str, Path], seed: int = 0) -> dict[str, Path]:
    """Run each stage once and return the outputs' folders by the stage's name.

    Args:
        folder: the outputs' parent.
        world: a process group of one rank.
        compared: the inputs of stage `compare`.
        seed: the seed of the synthetic log and of training.
    """
    made = {name: folder / name for name in ("prepare", "encoder", "materialize", "ranker")}
    run_prepare(ALONE, {"source": {**SYNTHETIC, "seed": seed}}, made["prepare"])
    dataset = write_dataset(folder / "dataset")
    train_encoder(ALONE, dataset, made["encoder"], {"training": {"seed": seed}})
    materialize_dataset(ALONE, dataset, made["encoder"], made["materialize"])
    train_ranker(world, made["materialize"], made["ranker"], "side", epochs=1, batch_size=40, seed=seed)
    sids, trained = {"dataset": made["materialize"]}, {"model": made["ranker"]}

    def stage(name: str, body: Callable[[StageRun[Any]], None], config: Config, inputs: Mapping[str, Path]) -> None:
        made[name] = _commit(folder / name, world, name, body, config, inputs)

    baseline = parse(BaselineConfig, {"max_iter": 5, "min_samples_leaf": 5}, "test")
    stage("baseline", run_baseline, baseline, sids)
    stage("score", score, ScoreConfig(part_rows=150), {**trained, **sids})
    stage(
        "export", export_encoder, ExportConfig(checked_items=20), {"encoder": made["encoder"], "sids": sids["dataset"]}
    )
    export = RankerExportConfig(checked_rows=50)
    stage("ranker_export", export_ranker, export, {**trained, **sids, "encoder.sid": made["encoder"]})
    stage("compare", compare, CompareConfig(resamples=100), compared)
    return made


def _commit(
    out: Path,
    world: World,
    name: str,
    body: Callable[[StageRun[Any]], None],
    config: Config,
    inputs: Mapping[str, Path],
) -> Path:
    checkpoints = Checkpoints(out.with_name(f"{out.name}.checkpoint"), world, name, {}, config)
    facts: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(URI_VARIABLE, raising=False)
        with committing(out, world, stage=name, facts=facts) as staging:
            log = RunLog.open(0, name, staging, {}, {}, "", None)
            body(StageRun(config, inputs, staging, world, log, facts, checkpoints))
    return out
