"""The stages of a cycle, which use the champion's committed outputs as they are."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sidestack.components import ranker as ranker_jobs
from sidestack.encoder.config import ENCODER_INPUT, EncoderConfig
from sidestack.infra.config import parse, plain
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.graph import (
    RANKER_CODE,
    Stage,
    encoder_stage,
    gather_inputs,
    internal_job,
    materialize_stage,
    ranker_stage,
)
from sidestack.pipelines.retrain.config import JUDGE, JudgeConfig
from sidestack.pipelines.retrain.decide import dates_judged
from sidestack.pipelines.retrain.ledger import Plan
from sidestack.ranker.config import HoldoutConfig, RankerConfig
from sidestack.ranker.score_config import ScoreConfig

PREPARED, BEFORE, CHAMPION = "prepare", "before", "champion"
"""Labels of existing outputs: the snapshot, the champion's snapshot with SIDs, and the champion's ranker."""
CONTROL = "control"
"""Variant of the stages that measure the champion."""


def champion_encoder(name: str) -> str:
    """Return the label of the champion's encoder of a set of SIDs."""
    return f"champion-{ENCODER_INPUT}{name}"


def cycle_stages(config: PipelineConfig, plan: Plan, verified: Mapping[str, Path]) -> tuple[Stage, ...]:
    """Return the stages of a cycle after `prepare`, each after the stages of its inputs.

    Args:
        config: the run's. plan: the cycle's.
        verified: existing outputs, by the labels above.
    """
    has_champion = CHAMPION in verified
    encoders = {name: _encoder(config, plan, name, has_champion) for name in config.sid_names}
    moves = has_champion and plan.policy in ("refresh", "rebuild")
    materialize = _materialize(config, encoders, verified, config.retrain.encoder.published)
    found = [stage for stage in encoders.values() if isinstance(stage, Stage)] + [materialize]
    control = materialize
    if moves:
        kept = {name: champion_encoder(name) for name in config.sid_names}
        control = replace(_materialize(config, kept, verified, "keep"), variant=CONTROL)
        found.append(control)
    found.append(_drift(config, encoders, materialize, verified))
    judged: dict[str, str] = {"dataset": materialize.label, "drift": "drift"}
    if has_champion:
        found.append(_score(config, plan, control))
        judged["champion"] = found[-1].label
    if plan.policy != "never":
        ranker = _ranker(config, plan, materialize, verified)
        found += [ranker, _export(config, encoders, materialize, ranker)]
        judged |= {"candidate": ranker.label, "export": "ranker_export"}
    if config.retrain.reference and has_champion:
        found.append(_reference(config, plan, materialize))
        judged["reference"] = found[-1].label
    return *found, _judge(config, plan, judged)


def _encoder(config: PipelineConfig, plan: Plan, name: str, has_champion: bool) -> Stage | str:
    """Return the stage that trains an encoder, or the label of the encoder that stays."""
    if not has_champion or plan.policy == "rebuild":
        return encoder_stage(config, name)
    if plan.policy != "refresh":
        return champion_encoder(name)
    stage = encoder_stage(config, name)
    values = plain(stage.config)
    training = {**values["training"], **config.retrain.encoder.refresh_training}
    settings = parse(EncoderConfig, {**values, "training": training}, "retrain.encoder.refresh_training")
    return replace(stage, config=settings, inputs={**stage.inputs, "start": champion_encoder(name)})


def _label(encoder: Stage | str) -> str:
    return encoder if isinstance(encoder, str) else encoder.label


def _materialize(
    config: PipelineConfig,
    encoders: Mapping[str, Stage | str],
    verified: Mapping[str, Path],
    published: Literal["keep", "move"],
) -> Stage:
    inputs = {f"{ENCODER_INPUT}{name}": _label(encoder) for name, encoder in encoders.items()}
    if BEFORE in verified:
        inputs["published"] = BEFORE
    settings = config.materialize.model_copy(update={"published": published})
    return replace(materialize_stage(config, []), config=settings, inputs={"dataset": PREPARED, **inputs})


def _drift(
    config: PipelineConfig, encoders: Mapping[str, Stage | str], materialize: Stage, verified: Mapping[str, Path]
) -> Stage:
    inputs = {"now": materialize.label, **{f"{ENCODER_INPUT}{name}": _label(one) for name, one in encoders.items()}}
    if BEFORE in verified:
        inputs["before"] = BEFORE
    code = ("infra", "encoder", "ranker", "pipelines/drift")
    job = partial(internal_job, "drift", "sidestack.pipelines.drift")
    return Stage("drift", job, code, config.drift, config.run.launch.compare, inputs)


def _score(config: PipelineConfig, plan: Plan, control: Stage) -> Stage:
    settings = ScoreConfig(dates=dates_judged(plan.measured))
    inputs = {"model": CHAMPION, "dataset": control.label}
    return Stage("score", ranker_jobs.score, RANKER_CODE, settings, config.run.launch.ranker, inputs, CONTROL)


def _ranker(config: PipelineConfig, plan: Plan, materialize: Stage, verified: Mapping[str, Path]) -> Stage:
    stage = ranker_stage(config, config.ranker.arm, materialize)
    settings = _on_dates(stage.config, plan)
    if CHAMPION not in verified:
        return replace(stage, config=settings)
    training = {**plain(settings)["training"], **_continued_settings(verified[CHAMPION]), **_training_settings(config)}
    if plan.policy == "rebuild":
        training |= {"start_sids": "anew", "start_tables": config.retrain.encoder.rebuild_tables}
    settings = parse(RankerConfig, {**plain(settings), "training": training}, "retrain.training")
    return replace(stage, config=settings, inputs={**stage.inputs, "start": CHAMPION})


def _training_settings(config: PipelineConfig) -> dict[str, Any]:
    """Return the settings of warm-started trainings: section `retrain` over those set in the run's file."""
    names = config.ranker.training.model_fields_set
    own = {name: value for name, value in plain(config.ranker)["training"].items() if name in names}
    arm = config.ranker.arms[config.ranker.arm].overlay.get("training", {})
    return {**own, **arm, **config.retrain.training}


def _continued_settings(champion: Path) -> dict[str, Any]:
    """Return the champion's batch size and one epoch, which replace a rule that would only see one night's rows."""
    described = json.loads((champion / "model" / "ranker.json").read_text(encoding="utf-8"))
    return {"batch_size": described["config"]["training"]["batch_size"], "epochs": 1, "validation_days": 0}


def _on_dates(config: Any, plan: Plan) -> RankerConfig:
    holdout = HoldoutConfig(kind="dates", learned=plan.learned, measured=plan.measured)
    return parse(RankerConfig, {**plain(config), "holdout": plain(holdout)}, "retrain")


def _reference(config: PipelineConfig, plan: Plan, materialize: Stage) -> Stage:
    """Return the stage of training from scratch, on all dates before the judged ones."""
    stage = ranker_stage(config, config.ranker.arm, materialize)
    whole = plan.model_copy(update={"learned": plan.all_dates})
    return replace(stage, config=_on_dates(stage.config, whole), variant="reference")


def _export(config: PipelineConfig, encoders: Mapping[str, Stage | str], materialize: Stage, ranker: Stage) -> Stage:
    """Return the stage that exports the candidate; the cycle registers the version, when the store answers."""
    inputs = {f"{ENCODER_INPUT}{name}": _label(encoders[name]) for name in config.ranker.content.used_sids}
    settings = config.ranker_export.model_copy(update={"registered_model": None})
    component = partial(gather_inputs, ranker_jobs.export, "encoders", ENCODER_INPUT)
    launch = config.run.launch.compare
    inputs = {"model": ranker.label, "dataset": materialize.label, **inputs}
    return Stage("ranker_export", component, ("infra", "ranker", "encoder"), settings, launch, inputs)


def _judge(config: PipelineConfig, plan: Plan, inputs: Mapping[str, str]) -> Stage:
    job = partial(internal_job, JUDGE, "sidestack.pipelines.retrain.judge")
    code = ("infra", "encoder/sid", "ranker", "pipelines/retrain", "pipelines/drift")
    settings = JudgeConfig(measured=plan.measured, gates=config.retrain.gates)
    return Stage(JUDGE, job, code, settings, config.run.launch.compare, inputs)
