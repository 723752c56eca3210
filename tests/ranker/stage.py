"""Run the body of the ranker's stage, and read its summary."""

import json
from pathlib import Path
from typing import Any

from sidestack.infra.distributed import World
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.train import train

ROWS_A_DAY = 250  # no multiple of the batch: the last test batches are padded


def run_stage_body(world: World, dataset: Path, out: Path, config: RankerConfig) -> StageRun[RankerConfig]:
    out.mkdir(parents=True, exist_ok=True)
    log = RunLog.open(world.rank, "ranker", out, config.model_dump(mode="json"), {}, "", None)
    run = StageRun(config, {"dataset": dataset}, out, world, log)
    train(run)
    log.finish("FINISHED")
    return run


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())
