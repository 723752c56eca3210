"""A stage that takes small steps in lockstep over ranks, saves checkpoints and fails on request.

    torchrun ... -m tests.infra.stepping_stage --out DIR --set encoder.steps=100 --set encoder.fault=stop

Its output, `sum.txt`, depends on every step of every rank.
"""

import os
import signal
import threading
import time
from typing import Literal

import torch

from sidestack.infra.checkpoint import Checkpoint
from sidestack.infra.config import Config
from sidestack.infra.distributed import lockstep, raise_on_all_ranks, sum_over_ranks
from sidestack.infra.errors import PreemptedError
from sidestack.infra.stage import StageRun, run_stage

Fault = Literal["", "die", "stop", "hang", "work"]


class SteppingConfig(Config):
    steps: int = 20
    seconds: float = 0.0
    """How long each step sleeps."""
    checkpoint_every: int = 5
    fault: Fault = ""
    """What rank `fault_rank` does before step `fault_step` in its first attempt: kill or stop its process, hang, or
    compute for `fault_seconds`."""
    fault_rank: int = 1
    fault_step: int = 12
    fault_seconds: float = 0.0


def body(run: StageRun[SteppingConfig]) -> None:
    world, config, checkpoints = run.world, run.config, run.checkpoints
    assert checkpoints is not None
    total, first = torch.zeros(1, dtype=torch.int64), 0
    if (found := checkpoints.load()) is not None:
        total, first = found.shared["total"].clone(), found.step
    run.facts["resumed_from"] = first
    done = first
    try:
        for step in lockstep(world, range(first, config.steps), "reading numbers"):
            with raise_on_all_ranks(world, f"step {step}"):
                if config.fault_rank == world.rank and step == config.fault_step and not _attempt():
                    fail(config)
                time.sleep(config.seconds)
            total = (total * 31 + sum_over_ranks(world, torch.tensor([step * (world.rank + 1)]))) % 1_000_003
            done = step + 1
            if done % config.checkpoint_every == 0:
                checkpoints.save(Checkpoint(done, {"total": total}, {}, {}))
            world.state.stop_if_agreed()
    except PreemptedError as stop:
        checkpoints.save_before_stop(Checkpoint(done, {"total": total}, {}, {}))
        raise PreemptedError(stop.signal, done) from stop
    if world.is_main:
        (run.out / "sum.txt").write_text(str(int(total)))


def fail(config: SteppingConfig) -> None:
    match config.fault:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            threading.Event().wait()
        case "work":
            until = time.monotonic() + config.fault_seconds
            while time.monotonic() < until:
                sum(range(10_000))


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


if __name__ == "__main__":
    run_stage("stepping", "encoder", SteppingConfig, [], body)
