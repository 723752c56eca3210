"""The stages of a sweep and of its parity check: what they run, on what, and what they share with the pipeline."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx.specs import AppDef

from encoder.config import EncoderConfig, MaterializeConfig
from infra.config import Config, load_file, load_section, parse
from infra.errors import ConfigError
from pipelines.config import PipelineConfig
from pipelines.graph import Stage, key, stages
from pipelines.sweep.grid import Budget, Setting
from pipelines.sweep.plan import parity_overrides, parity_stages, sweep_stages

CHOSEN = Setting(levels=8, depth=4, groups=2)


def config(**sections: Any) -> PipelineConfig:
    return parse(PipelineConfig, {"run": {"name": "test"}} | sections, "test")


def swept(*levels: int, **sections: Any) -> dict[str, Stage]:
    return {stage.label: stage for stage in sweep_stages(config(**sections), Budget(bits=24, levels=levels))}


def job(stage: Stage, config_file: str = "run.yaml") -> AppDef:
    inputs = {name: f"/{label}" for name, label in stage.inputs.items()}
    return stage.component(
        config=config_file, out="/out", key="k", parent_run="", j="1x1", image="", cpu=1, gpu=0, memMB=1, env={},
        mounts=[], max_restarts=0, max_retries=0, **inputs,
    )  # fmt: skip


def words(app: AppDef) -> list[str]:
    return shlex.split(app.roles[0].args[1].replace("$$", "$"))


def after(app: AppDef, flag: str) -> list[str]:
    line = words(app)
    return [line[place + 1] for place, word in enumerate(line) if word == flag]


def test_a_sweep_is_the_dataset_an_encoder_for_each_setting_and_the_choice() -> None:
    plan = swept(3, 64)
    assert list(plan) == [
        "prepare", "encoder-L3-d1-g15", "encoder-L3-d3-g5", "encoder", "encoder-L3-d15-g1",
        "encoder-L64-d1-g4", "encoder-L64-d2-g2", "encoder-L64-d4-g1", "sweep",
    ]  # fmt: skip
    assert plan["sweep"].inputs["encoder.L3-d5-g3"] == "encoder"
    assert sorted(plan["sweep"].inputs.values()) == sorted(label for label in plan if label.startswith("encoder"))


def test_the_configurations_own_setting_is_the_pipelines_own_encoder() -> None:
    own = next(stage for stage in stages(config()) if stage.label == "encoder")
    assert key(swept(3)["encoder"], {"dataset": "d"}) == key(own, {"dataset": "d"})


@pytest.mark.parametrize("section", [{}, {"quantizer": {"kind": "structured", "levels": 4}, "training": {"epochs": 2}}])
def test_a_stage_trains_what_its_key_says(tmp_path: Path, section: dict[str, Any]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"encoder": section, "run": {"name": "test"}}))
    values = load_file(file)
    plan = sweep_stages(parse(PipelineConfig, values, "test"), Budget(bits=24, levels=(8,)))
    for stage in (stage for stage in plan if stage.name == "encoder"):
        assert load_section(EncoderConfig, file, "encoder", after(job(stage, str(file)), "--set")) == stage.config


def test_the_choice_is_told_every_encoder() -> None:
    stage = swept(64)["sweep"]
    line = job(stage)
    assert "pipelines.sweep.choose" in words(line)
    assert after(line, "--input") == [f"{name}=/{label}" for name, label in stage.inputs.items()]


def contest(**sections: Any) -> tuple[PipelineConfig, dict[str, Stage]]:
    base = config(**sections)
    values: dict[str, Any] = {"run": {"name": "test"}} | sections
    for override in parity_overrides(base):
        dotted, _, text = override.partition("=")
        section, name = dotted.split(".")
        values[section] = {**values.get(section, {}), name: yaml.safe_load(text)}
    made = parse(PipelineConfig, values, "test")
    return made, {stage.label: stage for stage in parity_stages(made, CHOSEN)}


def test_parity_trains_each_arm_on_the_sids_it_is_about() -> None:
    _, plan = contest()
    ranker = {label: plan[f"ranker-{label}"].inputs["dataset"] for label in ("none", "side", "side_chosen")}
    assert ranker == {"none": "materialize", "side": "materialize", "side_chosen": "materialize-L8-d4-g2"}
    assert plan["materialize"].inputs["encoder"] == "encoder"
    assert plan["materialize-L8-d4-g2"].inputs == {"dataset": "prepare", "encoder": "encoder-L8-d4-g2"}
    assert {name for name in plan["compare"].inputs if name.startswith("arm.")} == {
        "arm.none.0", "arm.side.0", "arm.side_chosen.0",
    }  # fmt: skip


def test_parity_comes_in_an_order_that_can_be_run_and_ends_with_the_comparison() -> None:
    _, plan = contest()
    seen: set[str] = set()
    for label, stage in plan.items():
        assert set(stage.inputs.values()) <= seen
        seen.add(label)
    assert label == "compare"


def test_parity_reuses_the_arms_of_the_pipeline() -> None:
    pipeline = {stage.label: stage for stage in stages(config())}
    _, plan = contest()
    for label in ("encoder", "materialize", "ranker-none", "ranker-side"):
        names = dict.fromkeys(plan[label].inputs, "d")
        assert key(plan[label], names) == key(pipeline[label], names)
    assert key(plan["ranker-side_chosen"], {"dataset": "d"}) != key(pipeline["ranker-side"], {"dataset": "d"})


def test_chosen_arm_is_the_side_arm_with_its_settings() -> None:
    arm = {"item": "side", "history": "side", "overlay": {"training": {"warmup_steps": 7}}}
    made, plan = contest(ranker={"arms": {"none": {}, "side": arm, "other": {}}})
    assert list(made.arms) == ["none", "side", "side_chosen"]
    resolved: Config = plan["ranker-side_chosen"].config
    assert resolved.training.warmup_steps == 7  # type: ignore[attr-defined]


def test_chosen_sids_have_prefixes_they_can_have(tmp_path: Path) -> None:
    _, plan = contest()
    stage = plan["materialize-L8-d4-g2"]
    file = tmp_path / "run.yaml"
    file.write_text("run: {name: test}\n")
    assert stage.config == MaterializeConfig(prefix_lengths=(3, 5, 8))
    assert load_section(MaterializeConfig, file, "materialize", after(job(stage, str(file)), "--set")) == stage.config


def test_without_an_arm_side_there_is_nothing_to_hand_the_setting_to() -> None:
    made = config(ranker={"arm": "none", "arms": {"none": {}}})
    with pytest.raises(ConfigError, match="needs an arm 'side'"):
        list(parity_overrides(made))
