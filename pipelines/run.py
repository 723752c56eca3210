"""The driver: `python -m pipelines.run --config FILE [--set section.key=value ...]`.

It launches every stage that is not done yet on the configured scheduler, up to `run.jobs` at a time, and ends with the
comparison. A stage is done when the directory of its key is committed. So a failed run resumes where it failed, and a
run without changes only reads.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

from sidestack.infra.config import digest, plain
from sidestack.infra.console import replace_unencodable
from sidestack.infra.errors import SidestackError, StageError
from sidestack.infra.journal import Status
from sidestack.infra.locks import LockHeldError, locked
from sidestack.infra.manifest import fetched
from sidestack.infra.masking import masked
from sidestack.infra.mlflow_store import store_uri, use_store
from sidestack.infra.remote.copies import put
from sidestack.infra.remote.urls import address, path_argument, url_of, with_urls
from sidestack.pipelines.config import read_config
from sidestack.pipelines.environment import require_secrets, without_values
from sidestack.pipelines.execution import Pipeline, configs_dir, run_dir
from sidestack.pipelines.graph import Stage, stages
from sidestack.pipelines.launch import Launcher
from sidestack.pipelines.run_config import RunConfig
from sidestack.pipelines.tracker import Tracker


class StopSignal(BaseException):
    """Stop request by a signal.

    It is not an `Exception`, so that no library's broad handler swallows it.
    """

    def __init__(self, signum: int) -> None:
        """Store the signal's number."""
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run_pipeline(config_file: Path, overrides: Sequence[str] = ()) -> Path:
    """Run a pipeline to its end.

    Args:
        config_file: the run's YAML file.
        overrides: dotted `section.key=value`.

    Returns:
        the comparison's committed directory.

    Raises:
        SidestackError: the config, a stage, or a committed directory has a fault that the user can fix.
        StopSignal: a signal came; running jobs were cancelled or left running (`run.on_signal`).
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
    """Run the stages of a plan under one MLflow run.

    Args:
        plan: the stages, each after the stages of its inputs.
        run: how they are launched.
        values: the run's file with overrides applied; a copy is kept.
        resolved: the same with all defaults, for MLflow.
        title: the MLflow run's name, if it is not the run's own.

    Returns:
        the last stage's committed directory.

    Raises:
        SidestackError: see `run_pipeline`. StopSignal: a signal came.
    """
    require_secrets(run)
    use_store(run.runs_dir)
    with run_lock(run_dir(run)):
        record = _write_run_file(run, without_values(values))
        launcher = launcher_of(run)
        with raise_on_signals(), _track_run(run, without_values(resolved), title or run.name) as (tracker, artifacts):
            pipeline = Pipeline(run, launcher, tracker)
            try:
                pipeline.run_stages(plan)
                pipeline.log_changes(plan)
            finally:
                launcher.close()
            last = fetched(pipeline.done[plan[-1].label])
            artifacts += [record, *sorted(last.iterdir())]
    return last


def launcher_of(run: RunConfig) -> Launcher:
    """Return the launcher of a run's stages.

    Raises:
        ConfigError: the scheduler refuses an option.
    """
    log_dir, retry_s = run_dir(run) / "logs", run.scheduler_retry_minutes * 60
    return Launcher(run.scheduler, run.scheduler_options, log_dir, retry_s)


class AlreadyRunningError(StageError):
    """Error: another driver is running in the run's directory."""


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Lock a run's directory for one driver; the lock ends with the process.

    Raises:
        AlreadyRunningError: another driver has the lock. StageError: the directory cannot be written.
    """
    with ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(directory / ".lock", wait=False))
        except LockHeldError as error:
            owner = f" ({error})" if str(error) else ""
            raise AlreadyRunningError(f"{address(directory)}: another driver is running here{owner}") from None
        except OSError as error:
            raise StageError(f"{directory}: cannot be written ({error.strerror}); see run.runs_dir") from error
        yield


def _write_run_file(run: RunConfig, values: Mapping[str, Any]) -> Path:
    """Write a copy of the run's file with overrides applied; the stages do not read it."""
    text = yaml.safe_dump(dict(values), sort_keys=False)
    file = configs_dir(run) / f"run-{digest({'text': text})[:12]}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    put(file)
    return file


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `StopSignal`; exceptions of torchx's own handlers are easily swallowed.

    An ignored signal stays ignored, as SIGHUP under `nohup`.
    """

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # so that a second signal does not interrupt the cancelling
        raise StopSignal(signum)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _track_run(run: RunConfig, resolved: Mapping[str, Any], title: str) -> Iterator[tuple[Tracker, list[Path]]]:
    """Open the pipeline's MLflow run; on exit, end it with the body's status and the files it put into the list."""
    tracker = Tracker(run_dir(run), run.runs_dir, title, resolved)
    status: Status = "KILLED"
    artifacts: list[Path] = []
    try:
        yield tracker, artifacts
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        tracker.close(status, artifacts)


def print_result(compared: Path) -> None:
    """Print the comparison and the paths of all outputs; the last line is `comparison.json`'s path."""
    uri = masked(store_uri())
    with suppress(ValueError):
        local = Path(uri.removeprefix("sqlite:///")).relative_to(Path.cwd())
        uri = f"sqlite:///{local}"
    tool = Path(sys.executable).parent / "mlflow"
    opening = f"{relative_to_cwd(tool)} ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else uri
    print((compared / "table.txt").read_text(encoding="utf-8").rstrip())
    print()
    if (url := url_of(compared)) is not None:
        print(f"output  {url}")
    print(f"report  {relative_to_cwd(compared / 'report.html')}")
    print(f"MLflow  {opening}")
    print(relative_to_cwd(compared / "comparison.json"), flush=True)


@contextmanager
def exit_status() -> Iterator[None]:
    """Exit with one line and status 1 on an error, with 128 + its number on a signal."""
    replace_unencodable()
    try:
        yield
    except SidestackError as error:
        print(f"error: {with_urls(str(error))}", file=sys.stderr)
        raise SystemExit(1) from None
    except StopSignal as stop:
        with suppress(OSError):  # after SIGHUP, the terminal is gone
            print(f"stopped by {stop}; the same command resumes from here", file=sys.stderr, flush=True)
        raise SystemExit(128 + stop.signum) from None


def command_line(program: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command that runs stages: config file and overrides."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", type=path_argument, required=True, help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a config value")
    return parser


def relative_to_cwd(path: Path) -> Path:
    """Return a path relative to the current directory, if it is inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: 1 after an error, 128 + the signal's number after a signal.
    """
    arguments = command_line("pipelines.run", "Run the whole pipeline.").parse_args(argv)
    with exit_status():
        print_result(run_pipeline(arguments.config, arguments.set))


if __name__ == "__main__":
    main()
