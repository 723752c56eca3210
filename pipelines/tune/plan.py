"""The stages of tuning: every arm with every setting, on validation dates, and the choice for each."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from infra.config import parse, plain
from pipelines.config import PipelineConfig
from pipelines.graph import Stage, encoder_stage, internal_job, materialize_stage, prepare_stage, ranker_stage
from pipelines.tune.config import INPUT, Setting
from ranker.config import ArmConfig, RankerConfig

CODE = ("infra", "ranker", "pipelines/tune", "pipelines/report")


def tune_stages(config: PipelineConfig) -> tuple[Stage, ...]:
    """Return the stages: dataset and encoders as the pipeline has them, the trainings, and the choice.

    Raises:
        ConfigError: a setting does not fit an arm.
    """
    encoders = [encoder_stage(config, name) for name in config.sid_names]
    materialize = materialize_stage(config, encoders)
    trainings = {
        f"{INPUT}{arm}.{setting.name}": _training(config, ranker_stage(config, arm, materialize), arm, setting)
        for arm in config.arms
        for setting in config.tune.settings()
    }
    inputs = {name: stage.label for name, stage in trainings.items()}
    job = partial(internal_job, "tune", "pipelines.tune.choose")
    choice = Stage("tune", job, CODE, config.tune, config.run.launch.compare, inputs)
    return prepare_stage(config), *encoders, materialize, *trainings.values(), choice


def tuned_values(values: Mapping[str, Any], config: PipelineConfig, best: Mapping[str, Setting]) -> dict[str, Any]:
    """Return a run's file again, each arm with the setting that is best for it.

    Args:
        values: the run's file with overrides applied. config: the same, parsed. best: settings by arm.
    """
    arms = {name: _with(arm, best[name]) if name in best else arm for name, arm in config.ranker.arms.items()}
    return {**values, "ranker": {**values.get("ranker", {}), "arms": {name: plain(arm) for name, arm in arms.items()}}}


def _training(config: PipelineConfig, stage: Stage, arm: str, setting: Setting) -> Stage:
    tried = _with(config.ranker.arms[arm], setting)
    holdout = config.ranker.holdout.model_copy(update={"kind": "validation"})
    values = {**plain(config.ranker), "arm": arm, "arms": {arm: plain(tried)}, "holdout": plain(holdout)}
    resolved = parse(RankerConfig, values, f"tune (arm {arm!r})").resolved()
    return replace(stage, config=resolved, variant=f"{arm}-{setting.name}")


def _with(arm: ArmConfig, setting: Setting) -> ArmConfig:
    training = {**arm.overlay.get("training", {}), **plain(setting)}
    return arm.model_copy(update={"overlay": {**arm.overlay, "training": training}})
