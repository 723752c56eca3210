"""Stages small enough to launch in tests: `python -m tests.pipelines.fake_stage NAME ...` under torchrun."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from sidestack.infra.config import Config
from sidestack.infra.distributed import barrier
from sidestack.infra.errors import DataError
from sidestack.infra.stage import StageRun, run_stage


class FakeConfig(Config):
    """The behaviour of a fake stage."""

    text: str = "hello"
    fail_rank: int | None = None
    fault: str = "bug"
    sleep_s: float = 0.0
    variables: tuple[str, ...] = ()
    """Environment variables; the SHA-256 of each value is written to `variables.json`."""
    hold: str | None = None
    """Work until this file exists; each rank that starts writes a line to `<hold>.began`."""


def fake(run: StageRun[FakeConfig]) -> None:
    """Write each rank's file, and fail as configured."""
    run.log.info(f"{run.config.text} from {run.world.size} ranks")
    if run.config.hold is not None:
        _hold(run, Path(run.config.hold))
    if run.world.rank == run.config.fail_rank:
        if run.config.fault == "data":
            raise DataError("part.parquet: row group 3: column click: must be 0 or 1, is 7")
        if run.config.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the deliberate bug")
    if run.config.sleep_s:
        Path(f"{run.out}.asleep").touch()
    time.sleep(run.config.sleep_s)
    run.out.joinpath(f"rank{run.world.rank}.txt").write_text(run.config.text)
    if run.world.is_main:
        found = {name: hashlib.sha256(os.environ[name].encode()).hexdigest() for name in run.config.variables}
        run.out.joinpath("variables.json").write_text(json.dumps(found))
        for name in ("table.txt", "comparison.json", "report.html"):
            run.out.joinpath(name).write_text(f"{run.config.text}: {name}\n")
    run.log.metrics(0, {"loss": 0.5})
    run.log.summary({"ne": 0.9})
    barrier(run.world)


def _hold(run: StageRun[FakeConfig], until: Path) -> None:
    with Path(f"{until}.began").open("a") as began:
        began.write(f"{run.out} {run.world.rank} {os.getpid()}\n")
    while not until.exists():
        time.sleep(0.1)
    run.log.info("was let go")


if __name__ == "__main__":
    stage = sys.argv[1]
    inputs = ("dataset",) if stage == "ranker" else ()
    run_stage(stage, stage, FakeConfig, inputs, fake, sys.argv[2:])
