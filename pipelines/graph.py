"""The stages, their inputs, and the keys that identify finished stages.

Everything after the dataset is made once per replicate: replicate r trains its encoders and arms with the configured
seeds plus r. Within a replicate all arms read one materialized dataset.

A stage's section is resolved here, once: the arm, the seeds of the replicate, the settings of a trial. A stage gets no
other settings. A key covers all that decides a stage's output: that section's digest (which the manifest and
checkpoints contain too), the bytes of its inputs, and the code it may run, including other packages whose kinds it
names. It does not cover the scheduler, the ranks, the run's name, or where files are stored.
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
    """One stage of a pipeline; stages with the same name differ in variant or replicate.

    Attributes:
        name: the stage's name, also in its manifest.
        component: builds the job from the inputs by name and the common arguments of components.
        code: the packages and modules it may run, as paths from the repository's root.
        config: its resolved section.
        launch: nodes, ranks and resources.
        inputs: input name -> label of the stage that makes it.
        variant: the ranker's arm, or the name of an encoder's SIDs if not the default.
        replicate: number of the training, among those that differ only in seeds.
        section: the run file's section that `config` comes from, if it is not called `name`.
        identify: input name -> function of the part that decides the output; by default all that its manifest lists.
        source: returns the identity of what the stage reads besides its inputs.
        given: a committed output that is used instead of running the stage.
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
        """The unique name in the pipeline, such as `ranker-side`, or `ranker-side-r1` for the second replicate."""
        replicate = f"r{self.replicate}" if self.replicate else None
        return "-".join(part for part in (self.name, self.variant, replicate) if part)


def stages(config: PipelineConfig) -> tuple[Stage, ...]:
    """Return a pipeline's stages, each after the stages of its inputs."""
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
    """Return the stage that trains the encoder of a set of SIDs: on items (users) only, independent of events."""
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
        partial(gather_inputs, encoder_jobs.materialize, "encoders", ENCODER_INPUT),
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
    """Return the stage that trains the baseline on a materialized dataset, as a further arm."""
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
    """Return the last stage; it reports the first replicate's encoders and dataset."""
    trained = (stage for stage in plan if stage.name in ("ranker", BASELINE))
    arms = {input_name(stage.variant or BASELINE, stage.replicate): stage.label for stage in trained}
    encoders = {
        f"{ENCODER_INPUT}{stage.variant or DEFAULT_NAME}": stage.label
        for stage in plan
        if stage.name == "encoder" and stage.replicate == 0
    }
    component = partial(gather_inputs, pipeline_jobs.compare, "arms", PREFIX)
    return Stage(
        "compare",
        partial(gather_inputs, component, "encoders", ENCODER_INPUT),
        ("infra", "pipelines/compare.py", "pipelines/report", "ranker", "encoder"),
        config.compare,
        config.run.launch.compare,
        {**arms, **encoders, "prepare": "prepare", "dataset": "materialize"},
    )


def gather_inputs(component: Callable[..., AppDef], argument: str, prefix: str, **given: Any) -> AppDef:
    """Join the inputs of a prefix into the component's single argument."""
    names = [name for name in given if name.startswith(prefix)]
    joined = {name.removeprefix(prefix): given.pop(name) for name in names}
    return component(**{argument: joined}, **given)


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
    """Return the job of a stage that has no component of its own: its plan names the inputs."""
    launch = Launch.of(j, image, cpu, gpu, memMB, env, list(mounts), max_restarts, max_retries, cluster)
    return stage_app(name, module, launch, config=config, out=out, inputs=inputs, key=key, parent_run=parent_run)


def key(stage: Stage, inputs: Mapping[str, str], source: str = "", root: Path = ROOT) -> str:
    """Return the key of a stage's work.

    Args:
        stage: the stage.
        inputs: input name -> digest of that input's manifest.
        source: identity of what the stage reads besides its inputs, such as the files of a raw log.
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
