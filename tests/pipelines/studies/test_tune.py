"""Tuning: every arm is trained with the same settings, and its best setting on the validation dates is chosen."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.infra.config import digest, parse, to_yaml
from sidestack.infra.errors import ConfigError, DataError
from sidestack.pipelines.config import PipelineConfig, read_config
from sidestack.pipelines.graph import Stage
from sidestack.pipelines.studies.tune.__main__ import main
from sidestack.pipelines.studies.tune.choose import TABLE_FILE, Trial, Tuned, _trial, as_text
from sidestack.pipelines.studies.tune.config import LearningRates, TuneConfig
from sidestack.pipelines.studies.tune.plan import Left, rungs, tune_stages, tuned_values
from sidestack.ranker.config import RankerConfig
from tests.noted import noted
from tests.pipelines.commands import run_command
from tests.pipelines.studies.test_tables import SMALL

ARMS = {"none": {}, "side": {"item": "side", "overlay": {"training": {"warmup_steps": 7}}}}
GRID = {"sparse_learning_rates": [0.02, 0.04], "dense_learning_rates": [0.001]}


def whole(**changes: Any) -> PipelineConfig:
    ranker = {"arm": "none", "arms": ARMS, "budget": "thorough", **changes}
    return parse(PipelineConfig, {"run": {"name": "test"}, "ranker": ranker, "tune": GRID}, "test")


def plan(values: PipelineConfig, *later: Left) -> dict[str, Stage]:
    return {stage.label: stage for stage in tune_stages(values, later)}


def test_every_arm_gets_every_setting_and_nothing_else_differs() -> None:
    found = plan(whole())
    names = [f"ranker-{arm}-sparse{sparse}_dense0.001" for arm in ARMS for sparse in (0.02, 0.04)]
    assert list(found) == ["prepare", "encoder", "materialize", *names, "tune"]
    assert [name.removeprefix("ranker-").replace("-", ".", 1) for name in names] == [
        name.removeprefix("arm.0.") for name in found["tune"].inputs
    ]
    configs: dict[str, RankerConfig] = {}
    for name in names:
        config = found[name].config
        assert isinstance(config, RankerConfig)
        assert config.holdout.kind == "validation"
        configs[name] = config
    side = configs["ranker-side-sparse0.04_dense0.001"]
    assert (side.training.sparse_learning_rate, side.training.warmup_steps) == (0.04, 7)
    assert {one.training.steps_share for one in configs.values()} == {1.0}


def test_later_rung_trains_the_remaining_settings_longer_and_keeps_earlier_rungs() -> None:
    standard = whole(budget="standard")
    first = plan(standard)
    left = {"none": [TUNED.trials[0].setting], "side": [TUNED.trials[3].setting]}
    second = plan(standard, left)
    assert rungs(standard) == (0.125, 0.25)
    added = ["ranker-none-sparse0.02_dense0.001-0.25", "ranker-side-sparse0.04_dense0.001-0.25"]
    assert list(second) == [*list(first)[:-1], *added, "tune"]
    assert {label: second[label].config for label in list(first)[:-1]} == {
        label: stage.config for label, stage in first.items() if label != "tune"
    }
    shares = [stage.config.training.steps_share for stage in second.values() if stage.name == "ranker"]  # type: ignore[attr-defined]
    assert shares == [0.125] * 4 + [0.25] * 2
    names = ["arm.1.none.sparse0.02_dense0.001", "arm.1.side.sparse0.04_dense0.001"]
    assert list(second["tune"].inputs)[4:] == names


def test_better_half_of_the_last_rung_advances() -> None:
    trials = [trial("none", sparse, click, 0.8) for sparse, click in ((0.1, 0.6), (0.2, 0.5), (0.3, 0.7))]
    assert [one.sparse_learning_rate for one in Tuned(held_out=("", ""), trials=tuple(trials)).better_half["none"]] == [
        0.2, 0.1,
    ]  # fmt: skip
    second = [
        trials[0].model_copy(update={"rung": 1}),
        trials[1].model_copy(update={"rung": 1, "values": {"click": 9}}),
    ]
    tuned = Tuned(held_out=("", ""), trials=(*trials, *second))
    assert tuned.best["none"].setting.sparse_learning_rate == 0.1
    assert len(tuned.better_half["none"]) == 1


def test_search_budget_does_not_change_the_digest_of_a_training() -> None:
    quick, thorough = (whole(budget=budget).ranker.resolved("side") for budget in ("quick", "thorough"))
    assert digest(quick) == digest(thorough)


def test_rungs_must_rise() -> None:
    with pytest.raises(ConfigError, match=r"rungs=\[0.5, 0.25\] must rise"):
        parse(TuneConfig, {"rungs": [0.5, 0.25]}, "tune")


def trial(arm: str, sparse: float, click: float, conversion: float) -> Trial:
    setting = LearningRates(sparse_learning_rate=sparse, dense_learning_rate=0.001)
    return Trial(arm=arm, setting=setting, values={"click": click, "conversion": conversion}, steps=100, seconds=2.0)


TUNED = Tuned(
    held_out=("2020-01-01", "2020-01-07"),
    trials=(
        trial("none", 0.02, 0.60, 0.80), trial("none", 0.04, 0.61, 0.81),
        trial("side", 0.02, 0.60, 0.80), trial("side", 0.04, 0.61, 0.78),  # one percent of either task counts the same
    ),
)  # fmt: skip


def test_best_setting_of_each_arm_is_chosen_and_printed() -> None:
    assert {arm: best.setting.sparse_learning_rate for arm, best in TUNED.best.items()} == {"none": 0.02, "side": 0.04}
    grid = TuneConfig(sparse_learning_rates=(0.01, 0.02, 0.04), dense_learning_rates=(0.001,), rungs=(0.125,))
    lines = as_text(TUNED, grid).splitlines()
    assert lines[0] == "3 settings an arm, on 2020-01-01 to 2020-01-07"
    assert lines[1] == "cost: trainings, by their share of the steps: 4 of 0.125; 400 steps, 8 s"
    assert lines[3] == "arm   sparse  dense   click NE  conversion NE"
    assert lines[4] == "none  0.02    0.001     0.6000         0.8000"
    assert lines[5].endswith("(at the grid's edge: sparse)")


@pytest.mark.parametrize("tasks", [("buy",), ("view", "cart", "buy")])
def test_choice_uses_all_tasks(tasks: tuple[str, ...]) -> None:
    trials = [
        TUNED.trials[2].model_copy(update={"values": dict.fromkeys(tasks, 0.8)}),
        TUNED.trials[3].model_copy(update={"values": {**dict.fromkeys(tasks, 0.8), tasks[-1]: 0.79}}),
    ]
    tuned = TUNED.model_copy(update={"trials": tuple(trials)})
    assert tuned.best == {"side": trials[1]}
    head, row = as_text(tuned, parse(TuneConfig, {**GRID, "rungs": [1]}, "t")).splitlines()[3:5]
    assert head.split()[3:] == [word for task in tasks for word in (task, "NE")]
    assert row.split()[3:5] == (["0.8000", "0.8000"] if len(tasks) > 1 else ["0.7900", "(at"])


def test_tuned_file_changes_only_the_settings_of_the_arms() -> None:
    values = {"run": {"name": "test"}, "ranker": {"arm": "none", "arms": {**ARMS, "left": {}}}}
    before = parse(PipelineConfig, values, "test")
    tuned = tuned_values(values, before, {arm: best.setting for arm, best in TUNED.best.items()})
    after = parse(PipelineConfig, yaml.safe_load(to_yaml(tuned)), "test")
    side = after.ranker.arms["side"]
    assert (side.item, side.overlay["training"]) == (
        "side", {"warmup_steps": 7, "sparse_learning_rate": 0.04, "dense_learning_rate": 0.001},
    )  # fmt: skip
    assert after.ranker.arms["left"] == before.ranker.arms["left"]
    assert after.model_copy(update={"ranker": before.ranker}) == before


def test_tuned_file_names_the_default_arms() -> None:
    values = {"run": {"name": "test"}}
    before = parse(PipelineConfig, values, "test")
    after = parse(PipelineConfig, tuned_values(values, before, {"side": TUNED.best["side"].setting}), "test")
    assert {name: arm.item for name, arm in after.ranker.arms.items()} == {
        name: arm.item for name, arm in before.ranker.arms.items()
    }


def test_output_that_is_no_training_of_the_grid_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"arm": "side", "tasks": {"click": {"ne": None}}}))
    with pytest.raises(DataError, match="no training of the arm 'none'"):
        _trial(parse(TuneConfig, GRID, "t"), "arm.0.none.sparse0.02_dense0.001", tmp_path)
    with pytest.raises(DataError, match="NE of click is not defined on the validation dates"):
        _trial(parse(TuneConfig, GRID, "t"), "arm.0.side.sparse0.02_dense0.001", tmp_path)
    with pytest.raises(DataError, match=r"no training of the arm 'side\.sparse0\.5_dense0\.001'"):
        _trial(parse(TuneConfig, GRID, "t"), "arm.0.side.sparse0.5_dense0.001", tmp_path)


@pytest.mark.parametrize("words", [[], ["--run"]])
def test_pipeline_is_run_with_the_tuned_file_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / TABLE_FILE).write_text("the best")
    ran: list[Path] = []
    monkeypatch.setattr(
        "sidestack.pipelines.studies.tune.__main__.tune", lambda *_: (tmp_path, tmp_path / "tuned.yaml")
    )
    monkeypatch.setattr("sidestack.pipelines.studies.tune.__main__.run_pipeline", noted(ran.append, lambda _: tmp_path))
    monkeypatch.setattr(
        "sidestack.pipelines.studies.tune.__main__.print_result", lambda found: print("compared", found)
    )
    main(["--config", "run.yaml", *words])
    assert ran == ([tmp_path / "tuned.yaml"] if words else [])
    assert ("compared" in capsys.readouterr().out) == bool(words)


@pytest.mark.long
def test_whole_tuning_of_a_small_log(tmp_path: Path) -> None:
    launch = {stage: {"ranks": 1} for stage in ("prepare", "encoder", "materialize", "ranker")}
    run = {"name": "small", "runs_dir": f"{tmp_path}/runs", "launch": launch, "arms": ["side"], "jobs": 2}
    tuning = {"tune": GRID, "compare": {"reference": "side"}, "tables": {}}
    ranker = {**SMALL["ranker"], "holdout": {"validation_days": 1}}
    values: dict[str, Any] = {**SMALL, "ranker": ranker, "run": run, **tuning}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    done = run_command("sidestack.pipelines.studies.tune", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 settings an arm, on 2024-01-03 to 2024-01-03")
    tuned = tmp_path / "runs/small/tuned.yaml"
    assert done.stdout.endswith(f"run it  make run CONFIG={tuned}\n")
    _, config = read_config(tuned, [])
    assert config.ranker.arms["side"].overlay["training"]["sparse_learning_rate"] in GRID["sparse_learning_rates"]
