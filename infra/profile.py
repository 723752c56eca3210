"""A trace of a few steps of a training, by torch's profiler.

The trace shows the work of every rank's CPU and GPU over time; open it at ui.perfetto.dev or chrome://tracing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARMUP_STEPS = 5
"""First steps, not in the trace: model tracing, allocation, the reader's first row groups, the profiler's start."""
_TOP = 10
_STEP = "ProfilerStep"


class StepProfile:
    """A recorder of some steps of a loop after its first `WARMUP_STEPS`; no-op for 0 steps.

    It does not change the computation: weights have the same bits with and without a profile.

    Args of the constructor:
        steps: the number of steps. folder: where this rank's trace is written, as `rank-<number>.json.gz`.
        rank: its number. log: called with the most expensive operators, as text.
    """

    def __init__(
        self,
        steps: int = 0,
        folder: Path = Path(),
        rank: int = 0,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.steps = steps
        self._file = folder / f"rank-{rank:05d}.json.gz"
        self._log = log
        self._done = 0
        self._profiler: profile | None = None

    def step(self) -> None:
        """Note that a step has ended."""
        self._done += 1
        if self._profiler is not None:
            self._profiler.step()
            if self._done == WARMUP_STEPS + self.steps:
                self._stop()
        elif self.steps and self._done == WARMUP_STEPS - 1:
            self._profiler = self._start()

    def close(self) -> None:
        """End the recording with the loop; if the loop ended early, the trace has fewer steps."""
        self._stop()
        if self.steps and self._done <= WARMUP_STEPS:
            self._log(f"profile: nothing to trace: {self._done} steps; the first {WARMUP_STEPS} are left out")

    def _start(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        one_cycle = schedule(wait=0, warmup=1, active=self.steps, repeat=1)
        profiler = profile(activities=activities, schedule=one_cycle, on_trace_ready=self._write)
        profiler.start()
        return profiler

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _write(self, profiler: profile) -> None:
        if traced := self._done - WARMUP_STEPS:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._file))
            self._log(f"{top_operators(profiler, traced)}\ntrace  {self._file}")


def top_operators(profiler: profile, num_steps: int) -> str:
    """Return a table of the most expensive operators over `num_steps` steps, by time on the computing device."""
    averages = profiler.key_averages()
    steps = [one for one in averages if one.key.startswith(_STEP)]
    others = [one for one in averages if not one.key.startswith(_STEP)]
    has_gpu = any(one.self_device_time_total for one in others)

    def own_us(one: Any) -> float:
        return float(one.self_device_time_total if has_gpu else one.self_cpu_time_total)

    step_us = sum(one.cpu_time_total for one in steps) / num_steps
    lines = [f"profile of {num_steps} steps, {step_us / 1e3:.1f} ms each; {'GPU' if has_gpu else 'CPU'} time of a step"]
    for one in sorted(others, key=own_us, reverse=True)[:_TOP]:
        milliseconds, calls = own_us(one) / num_steps / 1e3, one.count / num_steps
        lines.append(f"  {milliseconds:9.2f} ms  {calls:7.1f} calls  {one.key[:80]}")
    return "\n".join(lines)
