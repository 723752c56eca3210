"""A pipeline of two fake stages, and its driver as a program."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from torchx.specs import AppDef

from sidestack.components.torchrun import Launch, stage_app
from sidestack.infra.config import Config, load_file, parse
from sidestack.pipelines import run as driver
from sidestack.pipelines.graph import Stage
from sidestack.pipelines.run_config import LaunchConfig, RunConfig
from tests.pipelines.fake_stage import FakeConfig

INPUTS = {"prepare": (), "ranker": ("dataset",)}


class FakePipelineConfig(Config):
    """The sections of a fake run's file."""

    prepare: FakeConfig = FakeConfig()
    ranker: FakeConfig = FakeConfig()
    run: RunConfig


def job(name: str, **arguments: Any) -> AppDef:
    launch = Launch(j=arguments["j"], env=arguments["env"])
    app = stage_app(
        name,
        "tests.pipelines.fake_stage",
        launch,
        config=arguments["config"],
        out=arguments["out"],
        inputs={input_name: arguments[input_name] for input_name in INPUTS[name]},
        key=arguments["key"],
        parent_run=arguments["parent_run"],
    )
    # Real stages have a module each; the fake ones share a module, which takes the stage's name as an argument.
    (role,) = app.roles
    role.args[1] = role.args[1].replace("fake_stage --config", f"fake_stage {name} --config")
    return app


def plan(config: FakePipelineConfig) -> tuple[Stage, ...]:
    code = ("tests/pipelines/fake_stage.py",)
    return (
        Stage("prepare", partial(job, "prepare"), code, config.prepare, LaunchConfig(ranks=1), {}),
        Stage("ranker", partial(job, "ranker"), code, config.ranker, config.run.launch.ranker, {"dataset": "prepare"}),
    )


def run_fake(config_file: Path, overrides: list[str]) -> Path:
    values = load_file(config_file, overrides)
    config = parse(FakePipelineConfig, values, config_file.name)
    return driver.run_stages(plan(config), config.run, values, config.model_dump(mode="json"))


if __name__ == "__main__":
    driver.run_pipeline = run_fake  # type: ignore[assignment]
    driver.main(sys.argv[1:])
