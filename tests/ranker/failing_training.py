"""The ranker's stage with a fault, FAULT, on one rank, FAULT_RANK; when it happens is written to FAULT_FILE."""

import errno
import os
import pkgutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

from ranker import train


def fail() -> NoReturn:
    raise RuntimeError(f"planted: {os.environ['FAULT']}")


def no_space() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_memory() -> NoReturn:
    raise MemoryError("planted: memory")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Fault(NamedTuple):
    """Where a fault is planted, at which call, and what it is."""

    place: str
    call: int = 0
    happen: Callable[[], None] = fail


FAULTS = {
    "open": Fault("ranker.train.read_dataset"),
    "verify": Fault("infra.snapshot.Dataset.verify_partition"),
    "plan": Fault("ranker.sharding.plan_tables"),
    "read": Fault("infra.impressions.ImpressionRows.read", 3),
    "convert": Fault("ranker.reader._block", 1),
    "step": Fault("ranker.model.GlobalLoss.forward", 5),
    "memory": Fault("ranker.model.GlobalLoss.forward", 5, no_memory),
    "killed": Fault("ranker.model.GlobalLoss.forward", 5, kill),
    "checkpoint": Fault("infra.checkpoint.write_state"),
    "predict": Fault("ranker.predict.prediction_table", 2),
    "write": Fault("infra.parquet.TableWriter.write", 2),
    "full disk": Fault("infra.parquet.TableWriter.write", 2, no_space),
    "model": Fault("ranker.train.save_bundle"),
    "summary": Fault("ranker.train.peak_memory_bytes"),
    "hash": Fault("infra.commit._describe", 1),
}


def plant(fault: Fault) -> None:
    kept, calls = pkgutil.resolve_name(fault.place), 0

    def body(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.call + 1:
            Path(os.environ["FAULT_FILE"]).write_text(str(time.time()))
            fault.happen()
        return kept(*args, **options)

    pytest.MonkeyPatch().setattr(fault.place, body)


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ["FAULT_RANK"]:
        plant(FAULTS[os.environ["FAULT"]])
    train.main()
