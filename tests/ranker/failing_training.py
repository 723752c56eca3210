"""The ranker's stage with a fault on one rank, under torchrun's agent.

Ranks are forked from a server that has imported torch and torchrec once (`tests.distributed`): a new interpreter for
each of them takes ten seconds of a core.
"""

import errno
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sidestack.ranker import train


def fail(name: str) -> NoReturn:
    raise RuntimeError(f"planted: {name}")


def no_space(name: str) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_memory(name: str) -> NoReturn:
    raise MemoryError(f"planted: {name}")


def kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Fault(NamedTuple):
    """The function in which a fault is planted, the index of the call, and the fault itself."""

    place: str
    call: int = 0
    happen: Callable[[str], None] = fail


FAULTS = {
    "open": Fault("sidestack.ranker.preparation.read_dataset"),
    "verify": Fault("sidestack.infra.snapshot.Dataset.verify_partition"),
    "plan": Fault("sidestack.ranker.sharding.plan_tables"),
    "read": Fault("sidestack.infra.impressions.ImpressionRows.read", 3),
    "convert": Fault("sidestack.ranker.reader._block", 1),
    "step": Fault("sidestack.ranker.model.GlobalLoss.forward", 5),
    "memory": Fault("sidestack.ranker.model.GlobalLoss.forward", 5, no_memory),
    "killed": Fault("sidestack.ranker.model.GlobalLoss.forward", 5, kill),
    "checkpoint": Fault("sidestack.infra.checkpoint.write_state"),
    "predict": Fault("sidestack.ranker.predict.prediction_table", 2),
    "write": Fault("sidestack.infra.parquet_writer.TableWriter.write", 2),
    "full disk": Fault("sidestack.infra.parquet_writer.TableWriter.write", 2, no_space),
    "model": Fault("sidestack.ranker.train.save_bundle"),
    "summary": Fault("sidestack.ranker.summary.peak_memory_bytes"),
    "hash": Fault("sidestack.infra.commit._describe", 1),
}


def plant(name: str, happened: Path) -> None:
    """Let a fault happen in this process, and its time be written to a file."""
    fault = FAULTS[name]
    original, calls = pkgutil.resolve_name(fault.place), 0

    def body(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.call + 1:
            happened.write_text(str(time.time()))
            fault.happen(name)
        return original(*args, **options)

    pytest.MonkeyPatch().setattr(fault.place, body)


def train_with_fault(name: str, rank: int, happened: Path, arguments: Sequence[str]) -> None:
    """Run the stage's main program on this rank; the fault is on rank `rank`."""
    if os.environ["RANK"] == str(rank):
        plant(name, happened)
    sys.argv = ["train", *arguments]
    train.main()


def launch(name: str, rank: int, happened: Path, arguments: Sequence[str], logs: Path) -> None:
    """Run the stage on two ranks, each in a process of its own.

    Raises:
        ChildFailedError: a rank failed; torchrun's agent has ended the others.
    """
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=name, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.1, start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )  # fmt: skip
    elastic_launch(config, train_with_fault)(name, rank, happened, list(arguments))
