"""Measurement of speed and memory: contestants take turns in one run, and ratios are paired by round.

A machine's speed drifts with other work on it. So the contestants take turns, in changing order, and a ratio is the
median over rounds of two times measured in the same round. Each is reported with its quartiles.
"""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sidestack.components.torchrun import KEEP_FREED_MEMORY

Rounds = Sequence[float] | npt.NDArray[np.float64]


class Contestant(NamedTuple):
    """A call to time, and the number of items that it processes."""

    call: Callable[[], object]
    items: int


class Spread(NamedTuple):
    """A median and its quartiles."""

    median: float
    low: float
    high: float


class Times:
    """Seconds per item of every contestant in every round, {name: [rounds]}."""

    def __init__(self, seconds: Mapping[str, Rounds]) -> None:
        self.seconds: dict[str, npt.NDArray[np.float64]] = {name: np.array(each) for name, each in seconds.items()}

    def rate(self, name: str) -> Spread:
        """Return the items per second."""
        return spread(1 / self.seconds[name])

    def ratio(self, name: str, of: str) -> Spread:
        """Return the speed of `name` relative to `of`, paired by round."""
        return spread(self.seconds[of] / self.seconds[name])

    def fastest(self, names: Sequence[str]) -> str:
        """Return the name with the least median time."""
        return min(names, key=lambda name: float(np.median(self.seconds[name])))


def spread(values: Rounds) -> Spread:
    """Return median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


RATES = {"samples_per_second": ",.0f", "low": ",.0f", "high": ",.0f"}
"""The columns of `rates`, name -> format."""


def rates(rate: Spread) -> dict[str, float]:
    """Return samples per second with their quartiles, as columns of a table."""
    return {"samples_per_second": rate.median, "low": rate.low, "high": rate.high}


def keep_freed_memory() -> None:
    """Re-execute this program with a stage's memory settings, if it was started without them."""
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # glibc reads them when a process starts
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **KEEP_FREED_MEMORY})


def take_turns(contestants: Mapping[str, Contestant], rounds: int, warm_up: int = 1) -> Times:
    """Time contestants in turns; each round begins with another one.

    Args:
        contestants: name -> contestant; one call should take about 10 ms or more.
        rounds: number of measured rounds. warm_up: number of rounds before them that do not count.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            contestants[name].call()
            if turn >= warm_up:
                seconds[name].append((time.perf_counter() - began) / contestants[name].items)
    return Times(seconds)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set the number of threads of torch, and of faiss if it is imported."""
    faiss = sys.modules.get("faiss")
    before = torch.get_num_threads(), faiss.omp_get_max_threads() if faiss else 0
    torch.set_num_threads(number)
    if faiss:
        faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        if faiss:
            faiss.omp_set_num_threads(before[1])


def thread_numbers() -> list[int]:
    """Return the numbers of threads to measure with: one, and two if there are two cores."""
    return [1, 2] if (os.cpu_count() or 1) > 1 else [1]


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Return a call's peak memory above the resident memory before it; None if this is not Linux."""
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory freed before must not count
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # reset the peak
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def own_peak_bytes() -> int:
    """Return the peak resident memory of this process, on Linux.

    Not `ru_maxrss`, which a child process inherits from its parent.
    """
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@dataclass(frozen=True)
class Finished:
    """A finished program: its wall-clock seconds, the largest resident memory of a process, and its output."""

    seconds: float
    peak_bytes: int
    output: str


def run_program(
    command: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Finished:
    """Run a program and its children to the end, quietly, in `folder` or the current directory.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    began = time.perf_counter()
    with subprocess.Popen(
        list(command), env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd=folder,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        output = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: ended with {process.returncode}:\n{output[-4000:]}")
    return Finished(time.perf_counter() - began, usage.ru_maxrss * 1024, output)
