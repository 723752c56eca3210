"""A launcher of one-rank stages that forks each from a server which has imported torch and our stages once.

A stage in a new process spends 5 to 7 seconds of a core on imports, and a replayed year starts hundreds of stages.
Stages run through their own main programs with their jobs' arguments, so their outputs are the usual ones.
"""

import os
import runpy
import shlex
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from torchx.specs import AppDef

from sidestack.infra.errors import StageError
from sidestack.pipelines.job_log import log_line
from sidestack.pipelines.jobs import Work

_STAGES = get_context("forkserver")
_STAGES.set_forkserver_preload([
    "sidestack.encoder.train", "sidestack.encoder.materialize", "sidestack.pipelines.prepare.__main__",
    "sidestack.pipelines.drift.__main__", "sidestack.ranker.train",
    "sidestack.ranker.score", "sidestack.ranker.export", "sidestack.pipelines.retrain.judge",
])  # fmt: skip
LOG_FILE = "log.txt"
CPU_FILE = "cpu_seconds.txt"


class ForkedStage(NamedTuple):
    """A running stage: its name, its process, its log file, and the time at which it is killed."""

    label: str
    process: BaseProcess
    log: Path
    deadline: float


class ForkedLauncher:
    """A launcher like `pipelines.launch.Launcher`, for stages of one rank on this machine.

    Attributes:
        logs_starts: whether a stage's start is printed.
    """

    def __init__(self, logs_starts: bool = False) -> None:
        self.logs_starts = logs_starts
        self._under_way: list[ForkedStage] = []

    def attach(self, work: Work) -> ForkedStage | None:
        """Return None: there are no running stages to attach to, because stages end with the driver."""
        return None

    def start(self, work: Work, app: AppDef) -> ForkedStage:
        """Fork a stage; its output goes to one file in `work.rank_logs`, and the CPU seconds it took to another."""
        module, arguments = stage_command(app)
        work.rank_logs.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **app.roles[0].env, "OMP_NUM_THREADS": "1"}
        log = work.rank_logs / LOG_FILE
        process = _STAGES.Process(target=_run, args=(module, arguments, environment, str(log)))
        process.start()
        if self.logs_starts:
            log_line(work.label, "starts")
        job = ForkedStage(work.label, process, log, time.monotonic() + work.limit_s)
        self._under_way.append(job)
        return job

    def has_succeeded(self, job: ForkedStage) -> bool:
        """Return whether a stage has succeeded; False: it is still running.

        Raises:
            StageError: the stage failed, or took too long.
        """
        if job.process.is_alive():
            if time.monotonic() > job.deadline:
                self.cancel(job)
                raise StageError(f"[{job.label}] took too long")
            return False
        self._under_way.remove(job)
        if job.process.exitcode:
            lines = job.log.read_text(encoding="utf-8").splitlines()[-15:] if job.log.exists() else []
            raise StageError("\n".join([f"[{job.label}] ended with status {job.process.exitcode}:", *lines]))
        return True

    def cancel(self, job: ForkedStage) -> None:
        """End a stage."""
        if job.process.is_alive() and job.process.pid is not None:
            os.kill(job.process.pid, signal.SIGKILL)
        job.process.join()
        if job in self._under_way:
            self._under_way.remove(job)

    def leave(self, job: ForkedStage) -> None:
        """End a stage, because it cannot outlive its driver."""
        self.cancel(job)

    def close(self) -> None:
        """End all running stages."""
        for job in list(self._under_way):
            self.cancel(job)


def stage_command(app: AppDef) -> tuple[str, list[str]]:
    """Return the module that a stage's job runs on every rank, and its arguments."""
    words = shlex.split(app.roles[0].args[-1].replace("$$", "$"))
    at = max(place for place, word in enumerate(words) if word == "-m")
    return words[at + 1], words[at + 2 :]


def _run(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Run a stage's main program in this process, as `python -m` does."""
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    with Path(log).open("a", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            runpy.run_module(module, run_name="__main__")
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
    Path(log).with_name(CPU_FILE).write_text(f"{time.process_time()}\n", encoding="utf-8")
