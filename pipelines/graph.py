"""The stages, what each is made from, and the keys by which a stage that is done is known.

A key covers all that decides a stage's output: its resolved section, the bytes of its inputs, and
the code it may run. It leaves out what does not: the scheduler, the ranks, the run's name.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchx.specs import AppDef

from components import encoder as encoder_jobs
from components import pipeline as pipeline_jobs
from components import ranker as ranker_jobs
from infra.config import Config, digest, plain
from pipelines.config import LaunchConfig, PipelineConfig

ROOT = Path(__file__).parents[1]

ARM_INPUT = "arm."


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline, or one arm of one.

    Attributes:
        name: the stage's name, which its manifest carries.
        component: makes the job; takes the inputs by name, and what every component takes.
        code: the packages and modules it may run, as paths from the repository's root.
        config: its resolved section.
        launch: nodes, ranks and resources.
        inputs: input name -> label of the stage whose output it is.
        arm: the ranker's arm.
    """

    name: str
    component: Callable[..., AppDef]
    code: tuple[str, ...]
    config: Config
    launch: LaunchConfig
    inputs: Mapping[str, str]
    arm: str | None = None

    @property
    def label(self) -> str:
        """The name among its pipeline's stages, such as `ranker-side`."""
        return self.name if self.arm is None else f"{self.name}-{self.arm}"


def stages(config: PipelineConfig) -> tuple[Stage, ...]:
    """Give a pipeline's stages, each after those it takes its inputs from."""
    launch = config.run.launch
    prepare = Stage(
        "prepare", pipeline_jobs.prepare, ("infra", "pipelines/prepare"), config.prepare, launch.prepare, {}
    )
    encoder = Stage(
        "encoder", encoder_jobs.train, ("infra", "encoder"), config.encoder, launch.encoder, {"dataset": "prepare"}
    )
    materialize = Stage(
        "materialize",
        encoder_jobs.materialize,
        ("infra", "encoder"),
        config.materialize,
        launch.materialize,
        {"dataset": "prepare", "encoder": "encoder"},
    )
    rankers = [_ranker(config, arm) for arm in config.arms]
    compare = Stage(
        "compare",
        _compare,
        ("infra", "pipelines/compare.py", "pipelines/report", "ranker", "encoder"),
        config.compare,
        launch.compare,
        {f"{ARM_INPUT}{ranker.arm}.0": ranker.label for ranker in rankers}
        | {"encoder": "encoder", "dataset": "materialize"},
    )
    return prepare, encoder, materialize, *rankers, compare


def _ranker(config: PipelineConfig, arm: str) -> Stage:
    return Stage(
        "ranker",
        partial(ranker_jobs.train, arm=arm),
        ("infra", "ranker", "encoder/__init__.py", "encoder/sid.py"),
        config.ranker.resolved(arm),
        config.run.launch.ranker,
        {"dataset": "materialize"},
        arm,
    )


def _compare(**arguments: Any) -> AppDef:
    """Gather the inputs `arm.<name>.<replicate>` into the one argument that the component takes."""
    names = [name for name in arguments if name.startswith(ARM_INPUT)]
    arms = {name.removeprefix(ARM_INPUT): arguments.pop(name) for name in names}
    return pipeline_jobs.compare(arms=arms, **arguments)


def key(stage: Stage, inputs: Mapping[str, str], root: Path = ROOT) -> str:
    """Name the work of a stage.

    Args:
        stage: the stage.
        inputs: input name -> digest of that input's manifest.
        root: the repository's root.

    Returns:
        a SHA-256, 64 hexadecimal digits.
    """
    return digest(
        {
            "stage": stage.name,
            "config": plain(stage.config),
            "inputs": dict(inputs),
            "code": code_digest(stage.code, root),
        }
    )


def code_digest(code: Sequence[str], root: Path = ROOT) -> str:
    """Give the SHA-256 over the names and contents of the Python files of packages and modules."""
    total = hashlib.sha256()
    for file in sorted(python_files(code, root)):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


def python_files(code: Sequence[str], root: Path = ROOT) -> Iterator[Path]:
    """Give the files of packages (all below) and of single modules."""
    for name in code:
        place = root / name
        yield from place.rglob("*.py") if place.is_dir() else [place]
