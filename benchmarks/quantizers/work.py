"""One measured run: a method at a number of bits, with a seed, on a corpus; kept by the digest of all it depends on.

Methods that differ only in the search for an encoder's codes share its training.
"""

import ast
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import torch

from sidestack.benchmarks.quantizers import baselines
from sidestack.benchmarks.quantizers.corpora import Corpus
from sidestack.benchmarks.quantizers.measures import measure
from sidestack.benchmarks.quantizers.methods import METHODS, EncoderMethod
from sidestack.benchmarks.quantizers.trained import ROOT, EncoderCoder, overrides, train
from sidestack.encoder.config import EncoderConfig
from sidestack.infra.code import code_digest
from sidestack.infra.config import digest, load_section, plain
from sidestack.infra.errors import SidestackError

_Timed = tuple[list[dict[str, Any]], float]
_MEASURING = ("measures.py", "trained.py", "baselines.py", "corpora.py")


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        corpus: the vectors to quantize. method: a name of `METHODS`. bits: nominal. seed: of the training.
        config: the YAML file of the shared network and training. sets: overrides of it, `a.b=c`.
    """

    corpus: Corpus
    method: str
    bits: int
    seed: int
    config: Path
    sets: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The run's name for messages."""
        return f"{self.corpus.name} {self.method} {self.bits} bits seed {self.seed}"

    def overrides(self) -> list[str]:
        """Return the overrides of the shared configuration, with those of the command line first."""
        method = METHODS[self.method]
        assert isinstance(method, EncoderMethod)
        return [*self.sets, *overrides(method.settings(self.bits), self.seed)]

    def encoder(self) -> EncoderConfig:
        """Return the whole configuration of one of our methods.

        Raises:
            ConfigError: the settings are not valid.
        """
        return load_section(EncoderConfig, self.config, "encoder", self.overrides())

    def key(self) -> str:
        """Return the digest of corpus, settings and code, which decide the result.

        Raises:
            ConfigError: the settings are not valid.
        """
        facts: dict[str, Any] = {"training": self.training_key(), "code": _code("measuring")}
        if isinstance(METHODS[self.method], EncoderMethod):
            facts |= {"search": plain(self.encoder().search)}
        return digest(facts)

    def training_key(self) -> str:
        """Return the digest of all that decides the training; tasks that differ only in the code search share it.

        Raises:
            ConfigError: the settings are not valid.
        """
        facts: dict[str, Any] = {"corpus": self.corpus.digest}
        if isinstance(METHODS[self.method], EncoderMethod):
            config = {name: value for name, value in plain(self.encoder()).items() if name != "search"}
            return digest({**facts, "encoder": config, "code": _code("training")})
        return digest(
            {**facts, "faiss": version("faiss-cpu"), "method": self.method, "bits": self.bits, "seed": self.seed}
        )

    def result_file(self, folder: Path) -> Path:
        """Return the file of its result."""
        return folder / self.corpus.name / f"{self.method}-{self.bits}-{self.seed}-{self.key()[:12]}.json"


def _code_now(part: str) -> str:
    here = Path(__file__).resolve().parent.relative_to(ROOT)
    if part == "measuring":
        return code_digest([str(here / name) for name in _MEASURING])
    return code_digest([*sorted(_imported("sidestack.encoder.train")), "infra/parquet.py", "infra/parquet_writer.py"])


_code = cache(_code_now)
"""The digest as of this process's first call."""


def _is_edited() -> bool:
    return any(_code(part) != _code_now(part) for part in ("measuring", "training"))


def _imported(module: str) -> set[str]:
    """Return the encoder's files that one of its modules imports, directly or not, including itself.

    The whole of `encoder/` would be simpler, but then an edit of its export would invalidate hours of training here.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        file = _file(waiting.pop())
        if file is None or file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _file(module: str) -> str | None:
    name = module.removeprefix("sidestack.")
    if name.split(".")[0] != "encoder":
        return None
    stem = name.replace(".", "/")
    return next((name for name in (f"{stem}.py", f"{stem}/__init__.py") if (ROOT / name).is_file()), None)


def run(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Train once and measure each of the tasks that share this training, on one thread.

    Raises:
        SidestackError: the stage failed.
    """
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    first = tasks[0]
    method = METHODS[first.method]
    if not isinstance(method, EncoderMethod):
        coder, seconds = baselines.trained(method.name, first.bits // 8, first.corpus.training, first.seed)
        return [{"seconds": seconds, **measure(coder, task.corpus)} for task in tasks]
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "encoder"
        seconds = train(first.config, [*first.overrides(), "encoder.search={}"], first.corpus.path, bundle)
        coders = [EncoderCoder(bundle, side=method.side, search=task.encoder().search) for task in tasks]
        return [{"seconds": seconds, **measure(coder, first.corpus)} for coder in coders]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task: a result, or the reason why there is none."""

    task: Task
    result: dict[str, Any] | None
    error: str = ""
    wall_seconds: float | None = None
    """Time of the training and all its measurements; None: the result was kept from an earlier run."""


def outcomes(tasks: Sequence[Task], folder: Path, *, jobs: int, fresh: bool) -> Iterator[Outcome]:
    """Yield every task's outcome when it is available: those kept in `folder` first, then the others as they finish.

    Args:
        tasks: the tasks to run. folder: where results are kept.
        jobs: processes at a time, each with one thread. fresh: also rerun tasks with kept results.

    Raises:
        ConfigError: a task's settings are not valid; no task was run.
    """
    files = {task: task.result_file(folder) for task in tasks}
    waiting: dict[str, list[Task]] = {}
    for task, file in files.items():
        if file.is_file() and not fresh:
            yield Outcome(task, json.loads(file.read_text(encoding="utf-8")))
        else:
            waiting.setdefault(task.training_key(), []).append(task)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_timed, together): together for together in waiting.values()}
        try:
            for future in as_completed(futures):
                yield from _outcomes(futures[future], future, files)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _timed(tasks: Sequence[Task]) -> _Timed:
    started = time.perf_counter()
    return run(tasks), time.perf_counter() - started


def _outcomes(tasks: Sequence[Task], future: Future[_Timed], files: Mapping[Task, Path]) -> Iterator[Outcome]:
    try:
        results, seconds = future.result()
    except SidestackError as error:
        yield from (Outcome(task, None, str(error)) for task in tasks)
        return
    for task, result in zip(tasks, results, strict=True):
        if _is_edited():  # the result's key may be of other code than made it
            yield Outcome(task, None, "code was edited while this ran; the result is not kept")
            continue
        write_result(files[task], result)
        yield Outcome(task, json.loads(files[task].read_text(encoding="utf-8")), wall_seconds=seconds)


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Write a result atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(f".{os.getpid()}.tmp")
    staging.write_text(json.dumps(result), encoding="utf-8")
    staging.rename(file)
