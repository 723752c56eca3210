"""The stages of a sweep and of its parity check: their inputs, and the stages shared with the pipeline."""

import shlex
from typing import Any

import pytest
import yaml
from torchx.specs import AppDef

from sidestack.infra.config import Config, parse
from sidestack.infra.errors import ConfigError
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.graph import Stage, key, stages
from sidestack.pipelines.studies.sweep.grid import Budget, Setting
from sidestack.pipelines.studies.sweep.plan import parity_overrides, sweep_stages

CHOSEN = Setting(levels=8, depth=4, groups=2)


def config(**sections: Any) -> PipelineConfig:
    return parse(PipelineConfig, {"run": {"name": "test"}} | sections, "test")


def swept(*levels: int, **sections: Any) -> dict[str, Stage]:
    return {stage.label: stage for stage in sweep_stages(config(**sections), Budget(bits=24, levels=levels))}


def job(stage: Stage) -> AppDef:
    inputs = {name: f"/{label}" for name, label in stage.inputs.items()}
    return stage.component(
        config="run.yaml", out="/out", key="k", parent_run="", j="1x1", image="", cpu=1, gpu=0, memMB=1, env={},
        mounts=[], max_restarts=0, max_retries=0, **inputs,
    )  # fmt: skip


def words(app: AppDef) -> list[str]:
    return shlex.split(app.roles[0].args[1].replace("$$", "$"))


def after(app: AppDef, flag: str) -> list[str]:
    line = words(app)
    return [line[place + 1] for place, word in enumerate(line) if word == flag]


def test_sweep_has_a_dataset_an_encoder_for_each_setting_and_a_choice() -> None:
    plan = swept(3, 64)
    assert list(plan) == [
        "prepare", "encoder-l3_d1_g15", "encoder-l3_d3_g5", "encoder", "encoder-l3_d15_g1",
        "encoder-l64_d1_g4", "encoder-l64_d2_g2", "encoder-l64_d4_g1", "sweep",
    ]  # fmt: skip
    assert plan["sweep"].inputs["encoder.l3_d5_g3"] == "encoder"
    assert sorted(plan["sweep"].inputs.values()) == sorted(label for label in plan if label.startswith("encoder"))


def test_sweep_ignores_further_encoders_of_the_configuration() -> None:
    further = {
        "encoders": {"text_sid": {"signals": {"text_embedding": 1.0}}},
        "materialize": {"prefix_lengths": {"sid": [5], "text_sid": [5]}},
    }
    assert list(swept(64, **further)) == list(swept(64))


def test_configured_setting_reuses_the_pipelines_encoder() -> None:
    own = next(stage for stage in stages(config()) if stage.label == "encoder")
    assert key(swept(3)["encoder"], {"dataset": "d"}) == key(own, {"dataset": "d"})


def test_choice_gets_every_encoder_as_input() -> None:
    stage = swept(64)["sweep"]
    line = job(stage)
    assert "sidestack.pipelines.studies.sweep.choose" in words(line)
    assert after(line, "--input") == [f"{name}=/{label}" for name, label in stage.inputs.items()]


def contest(**sections: Any) -> tuple[PipelineConfig, dict[str, Stage]]:
    base = config(**sections)
    values: dict[str, Any] = {"run": {"name": "test"}} | sections
    for override in parity_overrides(base, CHOSEN):
        dotted, _, text = override.partition("=")
        section, _, name = dotted.partition(".")
        laid_over = yaml.safe_load(text)
        values[section] = {**values.get(section, {}), name: laid_over} if name else laid_over
    made = parse(PipelineConfig, values, "test")
    return made, {stage.label: stage for stage in stages(made)}


def test_parity_gives_each_arm_its_sids_on_the_same_rows() -> None:
    made, plan = contest()
    assert made.arms == ("none", "side", "side_chosen")
    assert {name: arm.sids for name, arm in made.ranker.arms.items() if name != "none"} == {
        "side": ("sid",), "side_chosen": ("l8_d4_g2",),
    }  # fmt: skip
    assert plan["materialize"].inputs == {
        "dataset": "prepare", "encoder.sid": "encoder", "encoder.l8_d4_g2": "encoder-l8_d4_g2",
    }  # fmt: skip
    assert all(plan[f"ranker-{arm}"].inputs == {"dataset": "materialize"} for arm in made.arms)
    assert "baseline" not in plan


def test_parity_reuses_the_encoders_of_pipeline_and_sweep() -> None:
    own, (_, plan), grid = {stage.label: stage for stage in stages(config())}, contest(), swept(8)
    assert key(plan["encoder"], {"dataset": "d"}) == key(own["encoder"], {"dataset": "d"})
    assert key(plan["encoder-l8_d4_g2"], {"dataset": "d"}) == key(grid["encoder-l8_d4_g2"], {"dataset": "d"})


def test_chosen_arm_is_the_side_arm_with_its_settings() -> None:
    arm = {"item": "side", "history": "side", "overlay": {"training": {"warmup_steps": 7}}}
    _, plan = contest(ranker={"arms": {"none": {}, "side": arm, "other": {}}})
    resolved: Config = plan["ranker-side_chosen"].config
    assert resolved.training.warmup_steps == 7  # type: ignore[attr-defined]


def test_chosen_sids_have_valid_prefix_lengths() -> None:
    made, _ = contest()
    assert made.materialize.prefix_lengths == {"sid": (5, 10, 15), "l8_d4_g2": (3, 5, 8)}


def test_parity_is_refused_without_an_arm_side() -> None:
    made = config(ranker={"arm": "none", "arms": {"none": {}}})
    with pytest.raises(ConfigError, match="needs an arm 'side'"):
        list(parity_overrides(made, CHOSEN))
