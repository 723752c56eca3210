"""Execution of a plan: which stages are done, which may start, and their jobs."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torchx.specs import AppDef

from sidestack.infra.commit import require_free
from sidestack.infra.config import digest, plain, to_yaml
from sidestack.infra.errors import CommitError, StageError, UnansweredError
from sidestack.infra.lease import lease_file
from sidestack.infra.manifest import is_committed, read_manifest, require_whole
from sidestack.infra.remote.copies import is_there, put, remove_file
from sidestack.infra.remote.urls import address
from sidestack.pipelines.environment import job_environment, name_secrets
from sidestack.pipelines.graph import Stage, key
from sidestack.pipelines.job_log import log_line
from sidestack.pipelines.jobs import Work
from sidestack.pipelines.run_config import LaunchConfig, RunConfig
from sidestack.pipelines.tracker import Tracker

_POLL_SECONDS = 0.3

_ON_THIS_MACHINE = ("local_cwd", "local_docker")


class Launches(Protocol):
    """Interface to a scheduler's jobs; see `pipelines.launch.Launcher`. Each launcher has its own type of job."""

    def start(self, work: Work, app: AppDef) -> Any:
        """Launch a job."""

    def attach(self, work: Work) -> Any | None:
        """Return the live job that an earlier driver launched; None if there is none."""

    def has_succeeded(self, job: Any) -> bool:
        """Return whether a job has succeeded; False while it is running."""

    def cancel(self, job: Any) -> None:
        """End a job."""

    def leave(self, job: Any) -> None:
        """Leave a job running for another driver to find."""


@dataclass(frozen=True)
class _RunningStage:
    """A launched stage, its key, the directory it commits, and its start (`time.monotonic`)."""

    stage: Stage
    work: str
    out: Path
    job: Any
    began: float


@dataclass
class Pipeline:
    """A running pipeline.

    Attributes:
        run: how stages are launched.
        launcher: the scheduler.
        tracker: logs the stages to MLflow; None: their record is in files only.
        done: committed outputs by stage label.
        seconds: duration of each launched stage, by label.
    """

    run: RunConfig
    launcher: Launches
    tracker: Tracker | None = None
    done: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run_stages(self, plan: Sequence[Stage]) -> None:
        """Run a plan until every stage is committed; a stage is launched as soon as its inputs are done.

        At most `run.jobs` jobs run at a time. If an earlier driver left a job, it is followed and no other is launched.
        A failed stage ends the others; a signal, or a scheduler that does not answer, ends or leaves them
        (`run.on_signal`). Stages resume from their checkpoints.

        Args:
            plan: the stages, each after the stages of its inputs.

        Raises:
            CommitError: an output was altered after its commit, or something else is in its place.
            StageError: a stage failed, or ended without committing; the scheduler refused a job or does not answer.
        """
        waiting, under_way = list(plan), list[_RunningStage]()
        try:
            while waiting or under_way:
                waiting = self._begin(waiting, under_way)
                ended = [one for one in under_way if self.launcher.has_succeeded(one.job)]
                for one in ended:
                    under_way.remove(one)
                    self._end(one)
                if under_way and not ended:
                    time.sleep(_POLL_SECONDS)
        except BaseException as error:
            self._stop(under_way, error)
            raise

    def output(self, stage: Stage) -> Path:
        """Return the directory that a stage commits; its inputs must be done."""
        return self._place(stage, self._key(stage))

    def log_changes(self, plan: Sequence[Stage]) -> None:
        """Log which stages' code or source changed while the pipeline ran: arms may have run different code."""
        for stage in plan:
            if stage.given is None and self._key(stage)[:12] != self.done[stage.label].name:
                log_line(stage.label, "its code or source changed during this run; it will run again next time")

    def _stop(self, under_way: Sequence[_RunningStage], error: BaseException) -> None:
        """Cancel all running jobs at once, or leave them running."""
        is_interrupted = isinstance(error, UnansweredError) or not isinstance(error, Exception)
        is_left = is_interrupted and self.run.on_signal == "leave"
        stop = self.launcher.leave if is_left else self.launcher.cancel
        if under_way:
            with ThreadPoolExecutor(max_workers=len(under_way)) as pool:
                list(pool.map(stop, [one.job for one in under_way]))

    def _begin(self, waiting: Sequence[Stage], under_way: list[_RunningStage]) -> list[Stage]:
        """Start stages whose inputs are done, up to `run.jobs`, and return those that still wait."""
        left = []
        for stage in waiting:
            is_ready = all(label in self.done for label in stage.inputs.values())
            if not is_ready or len(under_way) >= self.run.jobs:
                left.append(stage)
                continue
            if stage.given is not None:
                self._reuse(stage, stage.given)
                continue
            work = self._key(stage)
            out = self._place(stage, work)
            if is_committed(out):
                remove_file(lease_file(out))  # its driver was killed after the commit
                self._reuse(stage, out, work)
            else:
                under_way.append(self._launch(stage, out, work))
        return left

    def _end(self, one: _RunningStage) -> None:
        label = one.stage.label
        if not is_committed(one.out):
            raise StageError(f"[{label}] ended without error and without committing {address(one.out)}")
        read_manifest(one.out, stage=one.stage.name, key=one.work)
        self.seconds[label] = time.monotonic() - one.began
        log_line(label, f"done in {self.seconds[label]:.0f} s: {address(one.out)}")
        self._commit(one.stage, one.out, is_reused=False)

    def _commit(self, stage: Stage, out: Path, *, is_reused: bool) -> None:
        """Record a committed directory as a stage's output, and log it to MLflow."""
        if self.tracker is not None:
            self.tracker.add(stage.label, out, self._inputs(stage), is_reused=is_reused)
        self.done[stage.label] = out

    def _place(self, stage: Stage, work: str) -> Path:
        return run_dir(self.run) / stage.label / work[:12]

    def _key(self, stage: Stage) -> str:
        inputs = {
            name: stage.identify[name](path) if name in stage.identify else read_manifest(path).digest
            for name, path in self._inputs(stage).items()
        }
        return key(stage, inputs, stage.source() if stage.source is not None else "")

    def _inputs(self, stage: Stage) -> Mapping[str, Path]:
        return {name: self.done[label] for name, label in stage.inputs.items()}

    def _reuse(self, stage: Stage, out: Path, work: str | None = None) -> None:
        """Use a committed output for a stage, after checking that it is intact and has the stage's name and key."""
        try:
            require_whole(out, stage=stage.name, key=work)
        except CommitError as error:
            raise CommitError(f"{error}; remove {address(out)} to have it made again") from error
        log_line(stage.label, f"done before: {address(out)}")
        self._commit(stage, out, is_reused=True)

    def _launch(self, stage: Stage, out: Path, work: str) -> _RunningStage:
        require_free(out)
        launched = Work(stage.label, work, out, self.run.timeout_minutes * 60)
        job = self.launcher.attach(launched)
        if job is None:
            _remove_leftovers(launched)
            launch = stage.launch
            log_line(stage.label, f"starts with {launch.nodes} x {launch.ranks} ranks")
            job = self.launcher.start(launched, self._app(stage, out, work))
        return _RunningStage(stage, work, out, job, time.monotonic())

    def _app(self, stage: Stage, out: Path, work: str) -> AppDef:
        """Return a stage's job."""
        launch = stage.launch
        parent_run = "" if self.tracker is None else self.tracker.parent_run
        app = stage.component(
            config=address(self._write_config(stage)),
            out=address(out),
            key=work,
            parent_run=parent_run,
            j=f"{launch.nodes}x{launch.ranks}",
            cluster=self.run.cluster or "",
            image=self.run.image,
            cpu=self._cores(launch),
            gpu=launch.gpu,
            memMB=launch.memory_mb,
            env=job_environment(self.run, stage.code, is_tracked=bool(parent_run)),
            mounts=list(self.run.mounts),
            max_restarts=launch.max_restarts,
            max_retries=launch.max_retries,
            **{name: address(path) for name, path in self._inputs(stage).items()},
        )
        name_secrets(app, self.run)
        return app

    def _write_config(self, stage: Stage) -> Path:
        """Write a stage's resolved section, and nothing else, to the file that the stage reads."""
        file = configs_dir(self.run) / f"{stage.label}-{digest(stage.config)[:12]}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml({stage.section or stage.name: plain(stage.config)}), encoding="utf-8")
        put(file)
        return file

    def _cores(self, launch: LaunchConfig) -> int:
        """Return the cores of a job's node; concurrent jobs on this machine share its cores.

        Threads of two jobs on one core wait for each other at every barrier: on two cores, two trainings of two threads
        each took ten times as long as with one thread each.
        """
        if self.run.scheduler not in _ON_THIS_MACHINE:
            return launch.cpu
        return max(1, min(launch.cpu, (os.cpu_count() or 1) // self.run.jobs))


def run_dir(run: RunConfig) -> Path:
    """Return the directory of a run's stages, logs and configs."""
    return run.runs_dir / run.name


def configs_dir(run: RunConfig) -> Path:
    """Return the directory of the config files that a run's stages read."""
    return run_dir(run) / "configs"


def _remove_leftovers(work: Work) -> None:
    """Remove the leftovers of an ended job; if a job's record is still there, it may be running."""
    if is_there(lease_file(work.out)):
        return
    for torn in work.out.parent.glob(f".{work.out.name}.*.tmp"):
        if torn.is_dir():
            shutil.rmtree(torn)
        else:  # a record or a mark, written in part
            torn.unlink()
    shutil.rmtree(work.rank_logs, ignore_errors=True)
