"""One stage, one process group, one committed directory.

`run_stage` is the whole main program of every stage: it reads the arguments, resolves the section of the run's file
once, joins the process group, verifies the inputs, opens the output, runs the body, and commits. The driver passes a
file with only the resolved section; a run by hand passes a whole run's file and overrides. Both resolve to the same
section, and the manifest, the checkpoints and the driver's key hold the same digest of it.
"""

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from sidestack.infra.checkpoint import Checkpoints
from sidestack.infra.commit import committing, require_free
from sidestack.infra.config import Config, digest, load_section, plain, to_yaml
from sidestack.infra.console import replace_unencodable
from sidestack.infra.distributed import Timeouts, World, process_group, raise_on_all_ranks
from sidestack.infra.errors import ConfigError, PreemptedError, SidestackError
from sidestack.infra.hosts import require_alike_hosts
from sidestack.infra.logs import LOG, set_up
from sidestack.infra.manifest import FileEntry, Manifest, fetch_files, read_manifest, verify
from sidestack.infra.preemption import EXIT_STATUS, remove_mark, write_mark
from sidestack.infra.profile import WARMUP_STEPS, StepProfile
from sidestack.infra.record import CONFIG_FILE, HISTORY_FILE, SUMMARY_FILE
from sidestack.infra.remote.trees import require_writable
from sidestack.infra.remote.urls import local_path, path_argument, url_of, with_urls
from sidestack.infra.tracking import RunLog
from sidestack.infra.watchdog import watching

C = TypeVar("C", bound=Config)
C_co = TypeVar("C_co", bound=Config, covariant=True)


@dataclass(frozen=True)
class StageRun(Generic[C_co]):
    """The arguments of a stage's body.

    Attributes:
        config: the stage's section, resolved.
        inputs: name -> committed directory, verified.
        out: the temporary directory being committed; every rank may write its own files.
        world: the process group.
        log: metrics, summary and messages to the user; only rank 0 writes them.
        facts: entries that the body adds are saved in the manifest (rank 0's are used).
        checkpoints: where a long stage saves its state to resume from; None if the caller keeps no checkpoints.
        written: name -> entry of files that this rank hashed while writing; see `infra.commit.committing`.
        target: the directory that `out` becomes by its commit; a stage writes the diagnosis of a failure beside it.
            None if the caller keeps no such files.
        profile: called after each step of a training; traces some steps if the caller requested it.
    """

    config: C_co
    inputs: Mapping[str, Path]
    out: Path
    world: World
    log: RunLog
    facts: dict[str, Any] = field(default_factory=dict)
    checkpoints: Checkpoints | None = None
    written: dict[str, FileEntry] = field(default_factory=dict)
    target: Path | None = None
    profile: StepProfile = field(default_factory=StepProfile)


@dataclass(frozen=True)
class Inputs:
    """The names of a stage's inputs; one ending in ``.*`` stands for one or more inputs with that prefix."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the names as text."""
        return ", ".join([*self.required, *(f"{name} (may be left out)" for name in self.optional)]) or "none"

    def named(self, pairs: Sequence[str]) -> dict[str, Path]:
        """Parse NAME=DIR pairs and check them against the names.

        Raises:
            ConfigError: a pair is malformed, a name is unknown or occurs twice, or an input is missing.
        """
        paths: dict[str, Path] = {}
        for pair in pairs:
            name, separator, path = pair.partition("=")
            if not separator or not path:
                raise ConfigError(f"--input {pair!r}: must look like name=directory")
            if name in paths:
                raise ConfigError(f"--input {name!r}: given twice")
            paths[name] = local_path(path)
        for name in paths:
            if not any(_matches(one, name) for one in (*self.required, *self.optional)):
                raise ConfigError(f"--input {name!r}: unknown; this stage takes: {self}")
        for one in self.required:
            if not any(_matches(one, name) for name in paths):
                raise ConfigError(f"--input {one}=DIR: is missing")
        return paths


def _matches(one: str, name: str) -> bool:
    return name.startswith(one[:-1]) if one.endswith(".*") else name == one


def with_inputs(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Rewrite `--NAME DIR` or `--NAME=DIR` in arguments to `--input NAME=DIR`, for some names."""
    out: list[str] = []
    words = iter(argv)
    for word in words:
        option, separator, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and option in names:
            out += ["--input", f"{option}={value if separator else next(words, '')}"]
        else:
            out.append(word)
    return out


def run_stage(
    name: str,
    section: str,
    config_type: type[C],
    inputs: Sequence[str],
    body: Callable[[StageRun[C]], None],
    argv: Sequence[str] | None = None,
    identify: Mapping[str, Callable[[C, Path], str]] | None = None,
    optional: Sequence[str] = (),
    is_training: bool = False,
) -> None:
    """Run a stage as this process's main program.

    Args:
        name: the stage's name, such as ``encoder``.
        section: the section of the run's file that configures it. config_type: that section's model.
        inputs: the inputs' names; one ending in ``.*`` stands for one or more inputs with that prefix.
        body: the work; called on every rank.
        argv: the arguments, by default the command line's.
        identify: by input, a function that digests the part that decides the work; by default the manifest's digest.
        optional: names of inputs that may be left out.
        is_training: whether the body has steps that `--profile` can trace.

    Raises:
        SystemExit: with status 1 after a user's error was printed on every rank; with 2 on wrong arguments; with
            `infra.preemption.EXIT_STATUS` after a stop signal.
    """
    quiet()
    replace_unencodable()
    takes = Inputs(tuple(inputs), tuple(optional))
    arguments = _parse(name, takes, argv, is_training)
    try:
        set_up(name, int(os.environ.get("RANK", "0")))
        _run(name, section, config_type, takes, body, arguments, identify or {})
    except SidestackError as error:
        # A short message, not a traceback: the user can fix it. torchrun's error file passes it to the driver.
        _record_error(error)
        LOG.error(with_urls(str(error)))
        raise SystemExit(EXIT_STATUS if isinstance(error, PreemptedError) else 1) from error
    except Exception as error:
        _record_error(error)
        raise


def _run(
    name: str,
    section: str,
    config_type: type[C],
    inputs: Inputs,
    body: Callable[[StageRun[C]], None],
    arguments: argparse.Namespace,
    identify: Mapping[str, Callable[[C, Path], str]],
) -> None:
    timeouts = Timeouts.of_environment(os.environ)
    with process_group(timeouts) as world:
        # Inside the group: torchrun stops a rank that still imports when another exits, and the error would be lost.
        with raise_on_all_ranks(world.committing, "reading the arguments"):
            config = load_section(config_type, arguments.config, section, arguments.set).resolved()
            paths = inputs.named(arguments.input)
            require_free(arguments.out)
            if world.local_rank == 0 and url_of(arguments.out) is not None:
                require_writable(arguments.out)
        with watching(world, arguments.out, timeouts, _record_error):
            _run_and_commit(world, name, section, config, paths, body, arguments, identify)


def _run_and_commit(
    world: World,
    name: str,
    section: str,
    config: C,
    paths: Mapping[str, Path],
    body: Callable[[StageRun[C]], None],
    arguments: argparse.Namespace,
    identify: Mapping[str, Callable[[C, Path], str]],
) -> None:
    """Verify the inputs, run the body, and commit what it made."""
    log: RunLog | None = None
    try:
        if world.is_main:
            remove_mark(arguments.out)
        manifests = _verified(world, paths)
        seen = {f"input {name}": manifest.digest for name, manifest in manifests.items()}
        require_alike_hosts(world.committing, {"config": digest(config), **seen})
        facts: dict[str, Any] = {"config": digest(config), "world_size": world.size}
        digests = {name: manifest.digest for name, manifest in manifests.items()}
        digests |= {name: of_input(config, paths[name]) for name, of_input in identify.items()}
        checkpoints = _checkpoints(arguments, world, name, digests, config)
        written: dict[str, FileEntry] = {}
        with (
            contextlib.ExitStack() as closing,
            committing(
                arguments.out, world, stage=name, key=arguments.key, inputs=digests, facts=facts, written=written
            ) as out,
        ):
            if world.is_main:
                (out / CONFIG_FILE).write_text(to_yaml({section: plain(config)}), encoding="utf-8")
            log = RunLog.open(world.rank, name, out, plain(config), paths, arguments.key, arguments.parent_run)
            traces = arguments.out.with_name(f"{arguments.out.name}.profile")
            profile = StepProfile(arguments.profile, traces, world.rank, log.info)
            _run_body(
                body, StageRun(config, paths, out, world, log, facts, checkpoints, written, arguments.out, profile)
            )
            facts.update(checkpoints.facts)
            closing.enter_context(world.state.finishing())  # the commit
    except BaseException as error:
        if isinstance(error, PreemptedError) and world.is_main:
            write_mark(arguments.out, error, world.size, world.state.asked_s)
        if log is not None:
            log.finish("KILLED" if isinstance(error, PreemptedError) else "FAILED")
        raise
    checkpoints.remove()
    assert log is not None
    if world.is_main:  # at a URL, several nodes upload files, and no node has all of them
        fetch_files(arguments.out, CONFIG_FILE, HISTORY_FILE, SUMMARY_FILE)
    log.finish("FINISHED", arguments.out)


def _checkpoints(
    arguments: argparse.Namespace, world: World, stage: str, inputs: Mapping[str, str], config: Config
) -> Checkpoints:
    out = Path(arguments.out)
    work = {"key": arguments.key, "inputs": dict(inputs)}
    return Checkpoints(out.with_name(f"{out.name}.checkpoint"), world, stage, work, config)


def _run_body(body: Callable[[StageRun[C]], None], run: StageRun[C]) -> None:
    """Run the body; record its error before other ranks fail because this one is missing."""
    try:
        body(run)
    except Exception as error:
        _record_error(error)
        raise


def _parse(name: str, inputs: Inputs, argv: Sequence[str] | None, is_training: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=name, description=f"Run the stage {name!r} and commit its output.")
    parser.add_argument(
        "--config",
        type=path_argument,
        help="the run's YAML file, or the stage's resolved one; without it, the defaults",
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a config value")
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=DIR",
        help=f"a committed input directory, or its URL; takes: {inputs}",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, required=True, help="the directory to commit, or its URL; must be free"
    )
    parser.add_argument("--key", default="", help="the digest that names this work, saved in the manifest")
    parser.add_argument("--parent-run", default=None, help="the MLflow run to log a child run under")
    parser.set_defaults(profile=0)
    if is_training:
        parser.add_argument(
            "--profile", type=_count, metavar="N", help=f"trace N steps, after the first {WARMUP_STEPS}, of every rank"
        )
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, at least 0")
    return int(text)


def _verified(world: World, paths: Mapping[str, Path]) -> dict[str, Manifest]:
    # Every rank reads the inputs on its own host, so every rank checks the manifests; only the first on each host
    # hashes the files.
    with raise_on_all_ranks(world.committing, "verifying the inputs"):
        check = verify if world.local_rank == 0 else read_manifest
        return {name: check(path) for name, path in paths.items()}


def quiet() -> None:
    """Hide the warnings of libraries; ours are raised or logged."""
    warnings.filterwarnings("ignore")
    for name in ("torchrec", "fbgemm_gpu", "torch.distributed", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _record_error(error: BaseException) -> None:
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
