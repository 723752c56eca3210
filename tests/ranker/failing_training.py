"""Run the ranker's stage with the fault FAULT on rank FAULT_RANK; the time of the fault is written to FAULT_FILE."""

import errno
import os
import pkgutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

from sidestack.ranker import train


def fail() -> NoReturn:
    raise RuntimeError(f"planted: {os.environ['FAULT']}")


def no_space() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_memory() -> NoReturn:
    raise MemoryError("planted: memory")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Fault(NamedTuple):
    """The function in which a fault is planted, the index of the call, and the fault itself."""

    place: str
    call: int = 0
    happen: Callable[[], None] = fail


FAULTS = {
    "open": Fault("sidestack.ranker.train.read_dataset"),
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
    "summary": Fault("sidestack.ranker.train.peak_memory_bytes"),
    "hash": Fault("sidestack.infra.commit._describe", 1),
}


def plant(fault: Fault) -> None:
    original, calls = pkgutil.resolve_name(fault.place), 0

    def body(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.call + 1:
            Path(os.environ["FAULT_FILE"]).write_text(str(time.time()))
            fault.happen()
        return original(*args, **options)

    pytest.MonkeyPatch().setattr(fault.place, body)


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ["FAULT_RANK"]:
        plant(FAULTS[os.environ["FAULT"]])
    train.main()
