"""The stages, what each is made from, and the keys by which a stage that is done is known.

Everything after the dataset is made once for every replicate: replicate r trains its encoders and its arms from the
configured seeds plus r. Within a replicate all arms read one materialized dataset.

A stage's section is resolved here, once: the arm, the seeds of the replicate, the settings of a trial. It is all that
the stage is told. A key covers all that decides a stage's output: that section's digest, which the stage's manifest and
checkpoints carry too, the bytes of its inputs, and the code it may run, with that of other packages whose kinds it
names. It leaves out what does not: the scheduler, the ranks, the run's name, where things are kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torchx.specs import AppDef

from sidestack.components import encoder as encoder_jobs
from sidestack.components import pipeline as pipeline_jobs
from sidestack.components import ranker as ranker_jobs
from sidestack.components.torchrun import Launch, stage_app
from sidestack.encoder.config import ENCODER_INPUT
from sidestack.encoder.sid.spec import DEFAULT_NAME
from sidestack.infra.code import ROOT, code_digest, foreign_code
from sidestack.infra.config import Config, digest
from sidestack.infra.kinds import models_in
from sidestack.infra.snapshot import content_digest
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.report.arms import PREFIX, input_name
from sidestack.pipelines.run_config import LaunchConfig
from sidestack.ranker.baseline.config import ARM as BASELINE

RANKER_CODE = ("infra", "ranker", "encoder/__init__.py", "encoder/sid", "encoder/sid_codebook.py")


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline: of several of its name, the one of a variant and a replicate.

    Attributes:
        name: the stage's name, which its manifest carries.
        component: makes the job; takes the inputs by name, and what every component takes.
        code: the packages and modules it may run, as paths from the repository's root.
        config: its resolved section.
        launch: nodes, ranks and resources.
        inputs: input name -> label of the stage whose output it is.
        variant: the ranker's arm, or the name of an encoder's SIDs where that is not the default.
        replicate: which of the trainings that differ in their seeds alone.
        section: the section of a run's file that `config` is, where it is not called `name`.
        identify: input name -> what of it decides the output; by default all that its manifest lists.
        source: makes the identity of what the stage reads beside its inputs.
        given: a committed output that is taken in the stage's place.
    """

    name: str
    component: Callable[..., AppDef]
    code: tuple[str, ...]
    config: Config
    launch: LaunchConfig
    inputs: Mapping[str, str]
    variant: str | None = None
    replicate: int = 0
    section: str = ""
    identify: Mapping[str, Callable[[Path], str]] = field(default_factory=dict)
    source: Callable[[], str] | None = None
    given: Path | None = None

    @property
    def label(self) -> str:
        """The name among its pipeline's stages, such as `ranker-side`, or `ranker-side-r1` of the second replicate."""
        replicate = f"r{self.replicate}" if self.replicate else None
        return "-".join(part for part in (self.name, self.variant, replicate) if part)


def stages(config: PipelineConfig) -> tuple[Stage, ...]:
    """Return a pipeline's stages, each after those it takes its inputs from."""
    plan = [prepare_stage(config)]
    for replicate in range(config.run.replicates):
        encoders = [encoder_stage(config, name, replicate) for name in config.sid_names]
        materialize = materialize_stage(config, encoders, replicate)
        plan += [*encoders, materialize, *(ranker_stage(config, arm, materialize, replicate) for arm in config.arms)]
        if config.baseline.enabled:
            plan.append(baseline_stage(config, materialize, replicate))
    return *plan, _comparison(config, plan)


def prepare_stage(config: PipelineConfig) -> Stage:
    """Return the stage that makes the dataset."""
    code = ("infra", "pipelines/prepare")
    launch, source = config.run.launch.prepare, config.prepare.data_identity
    return Stage("prepare", pipeline_jobs.prepare, code, config.prepare, launch, {}, source=source)


def encoder_stage(config: PipelineConfig, name: str = DEFAULT_NAME, replicate: int = 0) -> Stage:
    """Return the stage that trains the encoder of a set of SIDs: on items (users) alone, whatever the events are."""
    resolved = config.encoder_of(name, replicate)
    return Stage(
        "encoder",
        encoder_jobs.train,
        ("infra", "encoder"),
        resolved,
        config.run.launch.encoder,
        {"dataset": "prepare"},
        None if name == DEFAULT_NAME else name,
        replicate,
        identify={"dataset": partial(content_digest, entity=resolved.entity)},
        given=config.run.encoders.get(name),
    )


def materialize_stage(config: PipelineConfig, encoders: Sequence[Stage], replicate: int = 0) -> Stage:
    """Return the stage that writes the tables with the SIDs of all encoders."""
    inputs = {f"{ENCODER_INPUT}{encoder.variant or DEFAULT_NAME}": encoder.label for encoder in encoders}
    plugins = foreign_code(kind for encoder in encoders for kind in models_in(encoder.config))
    return Stage(
        "materialize",
        partial(gathered, encoder_jobs.materialize, "encoders", ENCODER_INPUT),
        ("infra", "encoder"),
        config.materialize,
        config.run.launch.materialize,
        {"dataset": "prepare", **inputs},
        replicate=replicate,
        source=partial(digest, plugins) if plugins else None,
    )


def ranker_stage(config: PipelineConfig, arm: str, materialize: Stage, replicate: int = 0) -> Stage:
    """Return the stage that trains an arm on a materialized dataset."""
    return Stage(
        "ranker",
        ranker_jobs.train,
        RANKER_CODE,
        config.ranker_of(arm, replicate),
        config.run.launch.ranker,
        {"dataset": materialize.label},
        arm,
        replicate,
    )


def baseline_stage(config: PipelineConfig, materialize: Stage, replicate: int = 0) -> Stage:
    """Return the stage that trains the baseline on a materialized dataset, as one more arm."""
    return Stage(
        BASELINE,
        ranker_jobs.baseline,
        RANKER_CODE,
        config.baseline_of(replicate),
        config.run.launch.baseline,
        {"dataset": materialize.label},
        replicate=replicate,
    )


def _comparison(config: PipelineConfig, plan: Sequence[Stage]) -> Stage:
    """Return the last stage; what it reports of encoders and dataset is the first replicate's."""
    trained = (stage for stage in plan if stage.name in ("ranker", BASELINE))
    arms = {input_name(stage.variant or BASELINE, stage.replicate): stage.label for stage in trained}
    encoders = {
        f"{ENCODER_INPUT}{stage.variant or DEFAULT_NAME}": stage.label
        for stage in plan
        if stage.name == "encoder" and stage.replicate == 0
    }
    component = partial(gathered, pipeline_jobs.compare, "arms", PREFIX)
    return Stage(
        "compare",
        partial(gathered, component, "encoders", ENCODER_INPUT),
        ("infra", "pipelines/compare.py", "pipelines/report", "ranker", "encoder"),
        config.compare,
        config.run.launch.compare,
        {**arms, **encoders, "prepare": "prepare", "dataset": "materialize"},
    )


def gathered(component: Callable[..., AppDef], argument: str, prefix: str, **given: Any) -> AppDef:
    """Gather the inputs of a prefix into the one argument that the component takes."""
    names = [name for name in given if name.startswith(prefix)]
    gathered = {name.removeprefix(prefix): given.pop(name) for name in names}
    return component(**{argument: gathered}, **given)


def internal_job(
    name: str,
    module: str,
    *,
    config: str,
    out: str,
    key: str,
    parent_run: str,
    j: str,
    image: str,
    cpu: int,
    gpu: int,
    memMB: int,
    env: dict[str, str],
    mounts: Sequence[str],
    max_restarts: int,
    max_retries: int,
    cluster: str = "",
    **inputs: str,
) -> AppDef:
    """Make the job of a stage that has no component of its own: a plan names its inputs."""
    launch = Launch.of(j, image, cpu, gpu, memMB, env, list(mounts), max_restarts, max_retries, cluster)
    return stage_app(name, module, launch, config=config, out=out, inputs=inputs, key=key, parent_run=parent_run)


def key(stage: Stage, inputs: Mapping[str, str], source: str = "", root: Path = ROOT) -> str:
    """Name the work of a stage.

    Args:
        stage: the stage.
        inputs: input name -> digest of that input's manifest.
        source: identity of what the stage reads beside its inputs, such as the files of a raw log.
        root: the repository's root.

    Returns:
        a SHA-256, 64 hexadecimal digits.
    """
    plugins = foreign_code(models_in(stage.config))
    return digest(
        {
            "stage": stage.name,
            "config": digest(stage.config),
            "inputs": dict(inputs),
            "source": source,
            "code": code_digest(stage.code, root),
            **({"plugins": plugins} if plugins else {}),
        }
    )
