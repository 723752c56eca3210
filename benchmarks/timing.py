"""How speed is measured: contestants beside each other in one run, ratios of neighbours in time, memory.

A machine's speed drifts while other work comes and goes. So the contestants take turns, in changing order, and a ratio
is the median over rounds of two times that were taken within one round; each is given with its quartiles.
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
    """What is timed, and how many items one call of it handles."""

    call: Callable[[], object]
    items: int


class Spread(NamedTuple):
    """A median and its quartiles."""

    median: float
    low: float
    high: float


class Times:
    """Seconds an item of every contestant in every round, {name: [rounds]}."""

    def __init__(self, seconds: Mapping[str, Rounds]) -> None:
        self.seconds: dict[str, npt.NDArray[np.float64]] = {name: np.array(each) for name, each in seconds.items()}

    def rate(self, name: str) -> Spread:
        """Return the items a second."""
        return spread(1 / self.seconds[name])

    def ratio(self, name: str, of: str) -> Spread:
        """Return how many times as fast `name` is as `of`, paired by round."""
        return spread(self.seconds[of] / self.seconds[name])

    def fastest(self, names: Sequence[str]) -> str:
        """Return the one with the least median."""
        return min(names, key=lambda name: float(np.median(self.seconds[name])))


def spread(values: Rounds) -> Spread:
    """Return median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


RATES = {"samples_per_second": ",.0f", "low": ",.0f", "high": ",.0f"}
"""The columns of `rates`, name -> format."""


def rates(rate: Spread) -> dict[str, float]:
    """Return samples a second with their quartiles, as columns of a table."""
    return {"samples_per_second": rate.median, "low": rate.low, "high": rate.high}


def keep_freed_memory() -> None:
    """Start this program again with a stage's settings of memory, where it was started without."""
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # glibc looks when a process starts
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **KEEP_FREED_MEMORY})


def take_turns(contestants: Mapping[str, Contestant], rounds: int, warm_up: int = 1) -> Times:
    """Time contestants in turns; each round begins with another one.

    Args:
        contestants: name -> contestant; one call should take some 10 ms or more.
        rounds: the measured rounds. warm_up: rounds before them that do not count.
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
    """Let torch, and faiss where it is imported, use so many threads."""
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
    """Return the numbers of threads to measure with: one, and two where there are two cores."""
    return [1, 2] if (os.cpu_count() or 1) > 1 else [1]


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Return the memory that a call takes at its peak beyond what is resident before; None where there is no Linux."""
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not this call's
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def own_peak_bytes() -> int:
    """Return the most memory that this process had resident, on Linux.

    Not `ru_maxrss`, which a process that was started by another takes over from it.
    """
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@dataclass(frozen=True)
class Finished:
    """What a program that ran to its end took: wall-clock seconds, and the largest resident memory of a process; and
    what it printed."""

    seconds: float
    peak_bytes: int
    said: str


def run_program(
    command: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Finished:
    """Run a program and its children to the end, quietly, in a folder or where this one runs.

    Raises:
        RuntimeError: it failed; holds what it printed last.
    """
    began = time.perf_counter()
    with subprocess.Popen(
        list(command), env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd=folder,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: ended with {process.returncode}:\n{said[-4000:]}")
    return Finished(time.perf_counter() - began, usage.ru_maxrss * 1024, said)
