"""The stages of a sweep, and the overrides of its parity check.

A setting is an encoder of the configuration with the setting's name; the configuration's own setting is its own
encoder. So a sweep's encoders are in the pipeline's directories, and sweep and pipeline reuse each other's.
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.sid.spec import DEFAULT_NAME
from sidestack.infra.config import plain
from sidestack.infra.errors import ConfigError
from sidestack.pipelines.config import WITHOUT_BASELINE, PipelineConfig
from sidestack.pipelines.graph import Stage, encoder_stage, internal_job, prepare_stage
from sidestack.pipelines.studies.sweep.grid import (
    Budget,
    Setting,
    knobs_of,
    prefix_lengths,
    quantizer_of,
    setting_of,
    settings,
)
from sidestack.pipelines.studies.sweep.result import INPUT

CODE = ("infra", "encoder", "pipelines/studies/sweep", "pipelines/report")

SIDE, CHOSEN = "side", "side_chosen"
"""The compared arms: with the configuration's own SIDs, and with those of the chosen setting."""


def sweep_stages(config: PipelineConfig, budget: Budget) -> tuple[Stage, ...]:
    """Return the stages of a sweep: the dataset, an encoder for each setting, and the choice.

    Raises:
        ConfigError: see `settings`, `quantizer_of` and `knobs_of`.
    """
    grid = list(settings(budget, knobs_of(config.encoder).lines))
    encoders = [encoder_stage(with_setting(config, setting), sid_name(config.encoder, setting)) for setting in grid]
    inputs = {f"{INPUT}{setting.name}": stage.label for setting, stage in zip(grid, encoders, strict=True)}
    job = partial(internal_job, "sweep", "sidestack.pipelines.studies.sweep.choose")
    choice = Stage("sweep", job, CODE, config.encoder, config.run.launch.compare, inputs, section="encoder")
    return prepare_stage(config), *encoders, choice


def sid_name(own: EncoderConfig, setting: Setting) -> str:
    """Return the name of a setting's SIDs: the setting's, or the default if it is the configuration's own."""
    return DEFAULT_NAME if setting == setting_of(knobs_of(own)) else setting.name


def with_setting(config: PipelineConfig, setting: Setting) -> PipelineConfig:
    """Return the configuration with a setting's encoder added, unless it is its own."""
    if (name := sid_name(config.encoder, setting)) == DEFAULT_NAME:
        return config
    return config.model_copy(update={"encoders": {**config.encoders, name: _otherwise(config, setting)}})


def _otherwise(config: PipelineConfig, setting: Setting) -> dict[str, Any]:
    return {"quantizer": plain(quantizer_of(config.encoder.quantizer, setting))}


def parity_overrides(config: PipelineConfig, chosen: Setting) -> Iterator[str]:
    """Yield the overrides that add the chosen setting's SIDs and arm, and keep only the arms to compare it with.

    Raises:
        ConfigError: there is no arm `side`, or it is the reference.
    """
    arms, reference = config.ranker.arms, config.compare.reference
    if SIDE not in arms or reference == SIDE:
        raise ConfigError(f"ranker.arms: the parity check needs an arm {SIDE!r} beside the reference {reference!r}")
    of_chosen = arms[SIDE].model_copy(update={"sids": (chosen.name,)})
    contest = {reference: arms[reference], SIDE: arms[SIDE], CHOSEN: of_chosen}
    lengths = {**config.materialize.prefix_lengths, chosen.name: prefix_lengths(chosen)}
    yield f"encoders={json.dumps({**config.encoders, chosen.name: _otherwise(config, chosen)})}"
    yield f"materialize.prefix_lengths={json.dumps(lengths)}"
    yield f"ranker.arms={json.dumps({name: plain(arm) for name, arm in contest.items()})}"
    yield f"ranker.arm={SIDE}"
    yield f"run.arms={json.dumps(list(contest))}"
    yield WITHOUT_BASELINE
