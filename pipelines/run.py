"""The driver: `python -m pipelines.run --config FILE [--set section.key=value ...]`.

It launches every stage that is not done yet on the configured scheduler, one after another, and ends
with the comparison. A stage is done when the directory of its key is committed, so a run that broke
goes on where it broke, and a run that changes nothing only reads.
"""

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from infra.commit import is_committed, read_manifest, refuse_taken, verify
from infra.config import digest, plain
from infra.errors import CommitError, SidestackError, StageError
from infra.mlflow_runs import (
    URI_VARIABLE,
    connect,
    end_parent,
    log_artifacts,
    open_parent,
    replay,
    use_store,
)
from pipelines.config import RunConfig, read_config
from pipelines.graph import Stage, key, stages
from pipelines.launch import Launcher, say

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


class Stopped(BaseException):
    """A signal asked the driver to stop.

    Not an `Exception`, so that no library's broad handler mistakes it for an error of its own.
    """

    def __init__(self, signum: int) -> None:
        """Remember the signal's number."""
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass
class Pipeline:
    """One run of the pipeline under way.

    Attributes:
        run: how stages are launched.
        config_file: the resolved file that every stage reads.
        launcher: the scheduler.
        client: the tracking store.
        parent_run: this run's id there.
        done: committed outputs by the stage's label.
    """

    run: RunConfig
    config_file: Path
    launcher: Launcher
    client: "MlflowClient"
    parent_run: str
    done: dict[str, Path] = field(default_factory=dict)

    def bring(self, stage: Stage) -> Path:
        """Give a stage's committed output, launching the stage if there is none yet.

        Raises:
            CommitError: the output was altered after its commit, or something else lies in its place.
            StageError: the stage failed, or ended without committing.
        """
        work = self._key(stage)
        inputs = {name: self.done[label] for name, label in stage.inputs.items()}
        out = run_dir(self.run) / stage.label / work[:12]
        if is_committed(out):
            self._reuse(stage, out, inputs)
        else:
            self._launch(stage, out, inputs, work)
        self.done[stage.label] = out
        return out

    def tell_changes(self, plan: Sequence[Stage]) -> None:
        """Say which stages ran code that was edited while the pipeline ran: arms may have run unlike code."""
        for stage in plan:
            if self._key(stage)[:12] != self.done[stage.label].name:
                say(stage.label, "its code was edited during this run; it will run again next time")

    def _key(self, stage: Stage) -> str:
        digests = {name: read_manifest(self.done[label]).digest for name, label in stage.inputs.items()}
        return key(stage, digests)

    def _reuse(self, stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
        try:
            verify(out)
        except CommitError as error:
            raise CommitError(f"{error}; remove {out} to have it made again") from error
        with _tracking():
            replay(self.client, self.parent_run, out, inputs)
        say(stage.label, f"done before: {out}")

    def _launch(self, stage: Stage, out: Path, inputs: Mapping[str, Path], work: str) -> None:
        refuse_taken(out)
        _clear_torn(out)
        launch = stage.launch
        app = stage.component(
            config=str(self.config_file),
            out=str(out),
            key=work,
            parent_run=self.parent_run,
            j=f"{launch.nodes}x{launch.ranks}",
            image=self.run.image,
            cpu=launch.cpu,
            gpu=launch.gpu,
            memMB=launch.memory_mb,
            env={URI_VARIABLE: os.environ[URI_VARIABLE], **self.run.env},
            mounts=list(self.run.mounts),
            max_restarts=launch.max_restarts,
            max_retries=launch.max_retries,
            **{name: str(path) for name, path in inputs.items()},
        )
        say(stage.label, f"starts with {launch.nodes} x {launch.ranks} ranks")
        started = time.monotonic()
        self.launcher.run(stage.label, app, _rank_logs(out), self.run.timeout_minutes * 60)
        if not is_committed(out):
            raise StageError(f"[{stage.label}] ended without error and without committing {out}")
        say(stage.label, f"done in {time.monotonic() - started:.0f} s: {out}")


def run_dir(run: RunConfig) -> Path:
    """Give the directory that has a run's stages, logs and configs."""
    return run.runs_dir / run.name


def run_pipeline(config_file: Path, overrides: Sequence[str] = ()) -> Path:
    """Run a pipeline to its end.

    Args:
        config_file: the run's YAML file.
        overrides: dotted `section.key=value`.

    Returns:
        the comparison's committed directory.

    Raises:
        SidestackError: the config, a stage, or a committed directory has a fault the user can mend.
        Stopped: a signal came; the running job was cancelled.
    """
    values, config = read_config(config_file, overrides)
    return run_stages(stages(config), config.run, values, plain(config))


def run_stages(
    plan: Sequence[Stage],
    run: RunConfig,
    values: Mapping[str, Any],
    resolved: Mapping[str, Any],
    title: str | None = None,
) -> Path:
    """Bring the stages of a plan one after another, under one MLflow run.

    Args:
        plan: the stages, each after those it takes its inputs from.
        run: how they are launched.
        values: the run's file with overrides applied, which is what the stages read.
        resolved: the same with all defaults, for MLflow.
        title: the MLflow run's name, where it is not the run's own.

    Returns:
        the last stage's committed directory.

    Raises:
        SidestackError: see `run_pipeline`. Stopped: a signal came.
    """
    with _alone(run_dir(run)):
        frozen = _freeze(run, values)
        launcher = Launcher(run.scheduler, run.scheduler_options, run_dir(run) / "logs")
        with _stopping(), _parent(run, resolved, title or run.name) as (client, parent_run):
            pipeline = Pipeline(run, frozen, launcher, client, parent_run)
            try:
                outputs = [pipeline.bring(stage) for stage in plan]
                pipeline.tell_changes(plan)
            finally:
                launcher.close()
            with _tracking():
                log_artifacts(client, parent_run, [frozen, *sorted(outputs[-1].iterdir())])
    return outputs[-1]


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a run's directory for one driver; the lock goes with the process.

    Raises:
        StageError: another driver has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"{directory}: another driver is running here") from None
        yield


def _freeze(run: RunConfig, values: Mapping[str, Any]) -> Path:
    """Write the file the stages read, so that none sees a change made while the run goes on."""
    text = yaml.safe_dump(dict(values), sort_keys=False)
    file = run_dir(run) / "configs" / f"{digest({'text': text})[:12]}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def _clear_torn(out: Path) -> None:
    """Remove what a killed stage left; nobody else writes here while this driver has the lock."""
    for torn in out.parent.glob(f".{out.name}.*.tmp"):
        shutil.rmtree(torn)
    shutil.rmtree(_rank_logs(out), ignore_errors=True)


def _rank_logs(out: Path) -> Path:
    """Give where the components have torchrun keep the ranks' logs."""
    return out.with_name(f"{out.name}.logs")


@contextmanager
def _stopping() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Stopped`; torchx's own handlers raise what is easily swallowed."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # the cancelling itself is not to be cut short
        raise Stopped(signum)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _parent(run: RunConfig, resolved: Mapping[str, Any], title: str) -> "Iterator[tuple[MlflowClient, str]]":
    """Open the pipeline's MLflow run, and end it as the body ends."""
    use_store(run.runs_dir)
    client = connect()
    parent_run = open_parent(client, run.name, title, run.runs_dir, resolved)
    status = "KILLED"
    try:
        yield client, parent_run
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        with _tracking():
            end_parent(client, parent_run, status)


@contextmanager
def _tracking() -> Iterator[None]:
    """Let a run go on when its tracking store does not: what the stages committed is the record."""
    try:
        yield
    except Exception as error:
        say("tracking", f"{type(error).__name__}: {error}")


def _tell_result(compared: Path) -> None:
    """Print the comparison and where everything is; the last line is `comparison.json`'s path."""
    uri = os.environ[URI_VARIABLE]
    with suppress(ValueError):
        local = Path(uri.removeprefix("sqlite:///")).relative_to(Path.cwd())
        uri = f"sqlite:///{local}"
    tool = Path(sys.executable).parent / "mlflow"
    opening = f"{near(tool)} ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else uri
    print((compared / "table.txt").read_text().rstrip())
    print()
    print(f"report  {near(compared / 'report.html')}")
    print(f"MLflow  {opening}")
    print(near(compared / "comparison.json"), flush=True)


@contextmanager
def exit_status() -> Iterator[None]:
    """Turn a fault into one line and status 1, a signal into 128 + its number."""
    try:
        yield
    except SidestackError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Stopped as stop:
        print(f"stopped by {stop}; the running stage was cancelled", file=sys.stderr)
        raise SystemExit(128 + stop.signum) from None


def command_line(program: str, description: str) -> argparse.ArgumentParser:
    """Give the parser of a command that runs stages: which file, and what to override."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a config value")
    return parser


def near(path: Path) -> Path:
    """Give a path as seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: 1 after a fault, 128 + the signal's number after a signal.
    """
    arguments = command_line("pipelines.run", "Run the whole pipeline.").parse_args(argv)
    with exit_status():
        _tell_result(run_pipeline(arguments.config, arguments.set))


if __name__ == "__main__":
    main()
