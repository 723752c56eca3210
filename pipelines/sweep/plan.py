"""The stages of a sweep, and of the parity check that follows it.

They share directories with the pipeline's own: a setting that is the configuration's own is the pipeline's encoder,
and whatever one of them has made the other finds done.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torchx.specs import AppDef

from components import encoder as encoder_jobs
from components.torchrun import Launch, stage_app
from encoder.config import EncoderConfig
from infra.config import plain
from infra.errors import ConfigError
from pipelines.config import PipelineConfig
from pipelines.graph import Stage, stages
from pipelines.sweep.grid import Budget, Setting, prefix_lengths, quantizer_of, setting_of, settings, structured
from pipelines.sweep.result import INPUT

CODE = ("infra", "encoder", "pipelines/sweep", "pipelines/report")

SIDE, CHOSEN = "side", "side_chosen"
"""The arms that are compared: with the configuration's own encoder, and with that of the chosen setting."""


def sweep_stages(config: PipelineConfig, budget: Budget) -> tuple[Stage, ...]:
    """Give the stages of a sweep: the dataset, an encoder for each setting, and the choice between them.

    Raises:
        ConfigError: see `settings`, `quantizer_of` and `structured`.
    """
    prepare, encoder, *_ = stages(config)
    lines = structured(config.encoder).lines
    encoders = [encoder_stage(encoder, config.encoder, setting) for setting in settings(budget, lines)]
    inputs = {f"{INPUT}{_setting(stage).name}": stage.label for stage in encoders}
    choice = Stage("sweep", _choose, CODE, config.encoder, config.run.launch.compare, inputs)
    return prepare, *encoders, choice


def encoder_stage(encoder: Stage, config: EncoderConfig, setting: Setting) -> Stage:
    """Give the stage that trains the encoder of a setting; for the configuration's own setting that is its own."""
    own = structured(config)
    quantizer = quantizer_of(own, setting)
    if quantizer == own:
        return encoder
    override = f"encoder.quantizer={json.dumps(plain(quantizer))}"
    return replace(
        encoder,
        component=partial(encoder_jobs.train, override),
        config=config.model_copy(update={"quantizer": quantizer}),
        arm=setting.name,
    )


def parity_overrides(config: PipelineConfig) -> Iterator[str]:
    """Give the overrides that add the arm of the chosen setting, and leave of the others what it is compared with.

    Raises:
        ConfigError: there is no arm `side`, or it is the reference.
    """
    arms, reference = config.ranker.arms, config.compare.reference
    if SIDE not in arms or reference == SIDE:
        raise ConfigError(f"ranker.arms: the parity check needs an arm {SIDE!r} beside the reference {reference!r}")
    contest = {reference: arms[reference], SIDE: arms[SIDE], CHOSEN: arms[SIDE]}
    yield f"ranker.arms={json.dumps({name: plain(arm) for name, arm in contest.items()})}"
    yield f"ranker.arm={SIDE}"
    yield f"run.arms={json.dumps(list(contest))}"


def parity_stages(config: PipelineConfig, chosen: Setting) -> tuple[Stage, ...]:
    """Give the stages that compare the chosen setting with the configuration's own in the ranker.

    Args:
        config: with `parity_overrides` applied.
        chosen: the sweep's choice.
    """
    plan = {stage.label: stage for stage in stages(config)}
    encoder = encoder_stage(plan["encoder"], config.encoder, chosen)
    lengths = prefix_lengths(chosen)
    materialize = replace(
        plan["materialize"],
        component=partial(encoder_jobs.materialize, f"materialize.prefix_lengths={json.dumps(lengths)}"),
        config=config.materialize.model_copy(update={"prefix_lengths": tuple(lengths)}),
        inputs={"dataset": "prepare", "encoder": encoder.label},
        arm=chosen.name,
    )
    plan[f"ranker-{CHOSEN}"] = replace(plan[f"ranker-{CHOSEN}"], inputs={"dataset": materialize.label})
    compare = plan.pop("compare")
    compare = replace(compare, inputs={**compare.inputs, "encoder": encoder.label})
    return _in_order([*plan.values(), encoder, materialize, compare])


def _in_order(plan: Iterable[Stage]) -> tuple[Stage, ...]:
    """Put each stage after those it takes its inputs from, otherwise leaving their order."""
    waiting, ordered = list(plan), list[Stage]()
    while waiting:
        done = {stage.label for stage in ordered}
        ready = next(stage for stage in waiting if done.issuperset(stage.inputs.values()))
        waiting.remove(ready)
        ordered.append(ready)
    return tuple(ordered)


def _setting(stage: Stage) -> Setting:
    assert isinstance(stage.config, EncoderConfig)
    return setting_of(structured(stage.config))


def _choose(
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
    **encoders: Any,
) -> AppDef:
    """Make the job of the last stage, which takes a name for each setting."""
    launch = Launch.of(j, image, cpu, gpu, memMB, env, list(mounts), max_restarts, max_retries)
    return stage_app(
        "sweep", "pipelines.sweep.choose", launch, config=config, out=out, inputs=encoders, key=key,
        parent_run=parent_run,
    )  # fmt: skip
