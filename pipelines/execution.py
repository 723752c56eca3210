"""A plan under way: which stages are done, which may start, and what is launched for them."""

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torchx.specs import AppDef

from infra.code import code_environment
from infra.commit import is_committed, read_manifest, refuse_taken, verify
from infra.config import digest, plain, to_yaml
from infra.errors import CommitError, StageError
from infra.mlflow_runs import URI_VARIABLE, replay
from pipelines.config import LaunchConfig, RunConfig
from pipelines.graph import Stage, key
from pipelines.launch import say

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_POLL_SECONDS = 0.3

_ON_THIS_MACHINE = ("local_cwd", "local_docker")


class Launches(Protocol):
    """Starts jobs, and tells what becomes of them; see `pipelines.launch.Launcher`. A job is the launcher's own."""

    def start(self, label: str, app: AppDef, rank_logs: Path, limit_s: float) -> Any:
        """Launch a job."""

    def has_succeeded(self, job: Any) -> bool:
        """Return whether a job has come to its good end; False: it is under way."""

    def cancel(self, job: Any) -> None:
        """End a job."""


@dataclass(frozen=True)
class _UnderWay:
    """A stage that was launched, the directory it commits, and when it began (`time.monotonic`)."""

    stage: Stage
    out: Path
    job: Any
    began: float


@dataclass
class Pipeline:
    """One run of the pipeline under way.

    Attributes:
        run: how stages are launched.
        launcher: the scheduler.
        client: the tracking store; None: stages keep their record in files alone.
        parent_run: this run's id there.
        done: committed outputs by the stage's label.
        seconds: of the stages that were launched, by label.
    """

    run: RunConfig
    launcher: Launches
    client: "MlflowClient | None"
    parent_run: str
    done: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def bring(self, plan: Sequence[Stage]) -> None:
        """Have every stage of a plan committed: what is not yet is launched, as soon as its inputs are done.

        At most `run.jobs` are under way at a time. One that fails ends the others, as a signal does; what they
        have checkpointed is where they go on.

        Args:
            plan: the stages, each after those it takes its inputs from.

        Raises:
            CommitError: an output was altered after its commit, or something else lies in its place.
            StageError: a stage failed, or ended without committing.
        """
        waiting, under_way = list(plan), list[_UnderWay]()
        try:
            while waiting or under_way:
                waiting = self._begin(waiting, under_way)
                ended = [one for one in under_way if self.launcher.has_succeeded(one.job)]
                for one in ended:
                    under_way.remove(one)
                    self._end(one)
                if under_way and not ended:
                    time.sleep(_POLL_SECONDS)
        except BaseException:
            for one in under_way:
                self.launcher.cancel(one.job)
            raise

    def output(self, stage: Stage) -> Path:
        """Return the directory that a stage whose inputs are done commits."""
        return self._place(stage, self._key(stage))

    def tell_changes(self, plan: Sequence[Stage]) -> None:
        """Say which stages' code or source changed while the pipeline ran: arms may have run unlike code."""
        for stage in plan:
            if stage.given is None and self._key(stage)[:12] != self.done[stage.label].name:
                say(stage.label, "its code or source changed during this run; it will run again next time")

    def _begin(self, waiting: Sequence[Stage], under_way: list[_UnderWay]) -> list[Stage]:
        """Take up the stages whose inputs are done, while there is room, and give those that still wait."""
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
                self._reuse(stage, out)
            else:
                under_way.append(self._launch(stage, out, work))
        return left

    def _end(self, one: _UnderWay) -> None:
        label = one.stage.label
        if not is_committed(one.out):
            raise StageError(f"[{label}] ended without error and without committing {one.out}")
        self.seconds[label] = time.monotonic() - one.began
        say(label, f"done in {self.seconds[label]:.0f} s: {one.out}")
        self.done[label] = one.out

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

    def _reuse(self, stage: Stage, out: Path) -> None:
        try:
            verify(out)
        except CommitError as error:
            raise CommitError(f"{error}; remove {out} to have it made again") from error
        if self.client is not None:
            with tracking():
                replay(self.client, self.parent_run, out, self._inputs(stage))
        say(stage.label, f"done before: {out}")
        self.done[stage.label] = out

    def _launch(self, stage: Stage, out: Path, work: str) -> _UnderWay:
        refuse_taken(out)
        _clear_torn(out)
        launch = stage.launch
        app = stage.component(
            config=str(self._write_config(stage)),
            out=str(out),
            key=work,
            parent_run=self.parent_run,
            j=f"{launch.nodes}x{launch.ranks}",
            cluster=self.run.cluster or "",
            image=self.run.image,
            cpu=self._cores(launch),
            gpu=launch.gpu,
            memMB=launch.memory_mb,
            env={
                **self._tracking_environment(),
                **self.run.timeouts.environment(),
                **code_environment(stage.code),
                **self.run.env,
            },
            mounts=list(self.run.mounts),
            max_restarts=launch.max_restarts,
            max_retries=launch.max_retries,
            **{name: str(path) for name, path in self._inputs(stage).items()},
        )
        say(stage.label, f"starts with {launch.nodes} x {launch.ranks} ranks")
        job = self.launcher.start(stage.label, app, _rank_logs(out), self.run.timeout_minutes * 60)
        return _UnderWay(stage, out, job, time.monotonic())

    def _tracking_environment(self) -> dict[str, str]:
        return {} if self.client is None else {URI_VARIABLE: os.environ[URI_VARIABLE]}

    def _write_config(self, stage: Stage) -> Path:
        """Write a stage's resolved section, alone, to the file that the stage reads."""
        file = configs_dir(self.run) / f"{stage.label}-{digest(stage.config)[:12]}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml({stage.section or stage.name: plain(stage.config)}), encoding="utf-8")
        return file

    def _cores(self, launch: LaunchConfig) -> int:
        """Return the cores of a job's node: on this machine, jobs beside each other share those that there are.

        Threads of two jobs on one core wait for each other at every barrier: two trainings of two threads each on two
        cores took ten times as long as of one thread each.
        """
        if self.run.scheduler not in _ON_THIS_MACHINE:
            return launch.cpu
        return max(1, min(launch.cpu, (os.cpu_count() or 1) // self.run.jobs))


def run_dir(run: RunConfig) -> Path:
    """Return the directory that has a run's stages, logs and configs."""
    return run.runs_dir / run.name


def configs_dir(run: RunConfig) -> Path:
    """Return the directory that has the files which a run's stages read."""
    return run_dir(run) / "configs"


def _clear_torn(out: Path) -> None:
    """Remove what a killed stage left; nobody else writes here while this driver has the lock."""
    for torn in out.parent.glob(f".{out.name}.*.tmp"):
        shutil.rmtree(torn)
    shutil.rmtree(_rank_logs(out), ignore_errors=True)


def _rank_logs(out: Path) -> Path:
    """Return where the components have torchrun keep the ranks' logs."""
    return out.with_name(f"{out.name}.logs")


@contextmanager
def tracking() -> Iterator[None]:
    """Let a run go on when its tracking store does not: what the stages committed is the record."""
    try:
        yield
    except Exception as error:
        say("tracking", f"{type(error).__name__}: {error}")
