"""The stages of tuning: trainings of every arm's settings, rung by rung, on validation dates, and the choice."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sidestack.infra.config import parse, plain
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.graph import Stage, encoder_stage, internal_job, materialize_stage, prepare_stage, ranker_stage
from sidestack.pipelines.studies.tune.config import INPUT, RUNGS, LearningRates, Share
from sidestack.ranker.config import ArmConfig, RankerConfig

CODE = ("infra", "ranker", "pipelines/studies/tune", "pipelines/report")

Left = Mapping[str, Sequence[LearningRates]]
"""Arm -> the settings that a rung tries."""


def rungs(config: PipelineConfig) -> tuple[Share, ...]:
    """Return the share of the steps in each rung."""
    return config.tune.rungs or RUNGS[config.ranker.budget]


def tune_stages(config: PipelineConfig, later: Sequence[Left] = ()) -> tuple[Stage, ...]:
    """Return the stages: the pipeline's dataset and encoders, the trainings of the known rungs, and the choice.

    Args:
        config: the run's. later: the remaining settings for the rungs after the first, as far as known.

    Raises:
        ConfigError: a setting does not fit an arm.
    """
    encoders = [encoder_stage(config, name) for name in config.sid_names]
    materialize = materialize_stage(config, encoders)
    whole_grid = dict.fromkeys(config.arms, list(config.tune.settings()))
    shares = rungs(config)
    trainings = {
        name: stage
        for number, left in enumerate([whole_grid, *later])
        for name, stage in _rung(config, materialize, number, shares[number], left)
    }
    inputs = {name: stage.label for name, stage in trainings.items()}
    job = partial(internal_job, "tune", "sidestack.pipelines.studies.tune.choose")
    resolved = config.tune.model_copy(update={"rungs": shares})
    choice = Stage("tune", job, CODE, resolved, config.run.launch.compare, inputs)
    return prepare_stage(config), *encoders, materialize, *trainings.values(), choice


def _rung(
    config: PipelineConfig, materialize: Stage, number: int, share: Share, left: Left
) -> Iterator[tuple[str, Stage]]:
    """Yield the trainings of a rung, each with its input name for the choice."""
    for arm, settings in left.items():
        for setting in settings:
            stage = _training(config, ranker_stage(config, arm, materialize), arm, setting, share)
            yield f"{INPUT}{number}.{arm}.{setting.name}", stage


def tuned_values(
    values: Mapping[str, Any], config: PipelineConfig, best: Mapping[str, LearningRates]
) -> dict[str, Any]:
    """Return a run's file in which each arm has its best setting.

    Args:
        values: the run's file with overrides applied. config: the same, parsed. best: settings by arm.
    """
    arms = {name: _with(arm, best[name]) if name in best else arm for name, arm in config.ranker.arms.items()}
    return {**values, "ranker": {**values.get("ranker", {}), "arms": {name: plain(arm) for name, arm in arms.items()}}}


def _training(config: PipelineConfig, stage: Stage, arm: str, setting: LearningRates, share: Share) -> Stage:
    tried = _with(config.ranker.arms[arm], setting)
    holdout = config.ranker.holdout.model_copy(update={"kind": "validation"})
    training = config.ranker.training.model_copy(update={"steps_share": share})
    values = {**plain(config.ranker), "arm": arm, "arms": {arm: plain(tried)}, "holdout": plain(holdout)}
    resolved = parse(RankerConfig, {**values, "training": plain(training)}, f"tune (arm {arm!r})").resolved()
    part = "" if share == 1 else f"-{share:g}"
    return replace(stage, config=resolved, variant=f"{arm}-{setting.name}{part}")


def _with(arm: ArmConfig, setting: LearningRates) -> ArmConfig:
    training = {**arm.overlay.get("training", {}), **plain(setting)}
    return arm.model_copy(update={"overlay": {**arm.overlay, "training": training}})
