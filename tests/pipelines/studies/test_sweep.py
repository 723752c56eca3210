"""The sweep's command: its output, and a whole sweep of a small synthetic log (marked long)."""

from pathlib import Path

import pytest
import yaml

from sidestack.pipelines.report.comparison import ArmResult, Comparison, Gain, MetricResult, TaskResult
from sidestack.pipelines.report.config import VerdictConfig
from sidestack.pipelines.studies.sweep.__main__ import main, parity_text
from sidestack.pipelines.studies.sweep.result import SweepResult
from tests.pipelines.commands import run_command


def task(ne: float | None, gain: tuple[float, float, float] | None) -> TaskResult:
    over = {"side": Gain(gain=gain[0], interval=gain[1:])} if gain else {}
    return TaskResult(num=9, positives=3, metrics={"ne": MetricResult(value=ne, over=over)})


def comparison(chosen: dict[str, TaskResult], own: dict[str, TaskResult]) -> Comparison:
    arms = {name: ArmResult.model_construct(tasks=tasks) for name, tasks in (("side", own), ("side_chosen", chosen))}
    return Comparison.model_construct(arms=arms, reference="side", replicates=2, rules=VerdictConfig())


def test_parity_is_printed_with_its_interval() -> None:
    text = parity_text(
        comparison(
            {"click": task(0.51, (0.002, 0.001, 0.003)), "conversion": task(0.75, (-0.001, -0.004, 0.002))},
            {"click": task(0.52, None), "conversion": task(0.74, None)},
        )
    )
    assert "click       0.5100, 0.5200: gain +0.20 % (+0.10 to +0.30 %): better\n" in text
    assert "conversion  0.7500, 0.7400: gain -0.10 % (-0.40 to +0.20 %): no difference shown" in text


def test_parity_of_an_undefined_metric_is_printed_as_undefined() -> None:
    text = parity_text(comparison({"click": task(None, None)}, {"click": task(None, None)}))
    assert "click  undefined on these rows" in text


def test_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"run: {{name: test, runs_dir: {tmp_path}}}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(file), "--bits", "24", "--levels", "7"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == ("error: sweep: 7 levels: their digits leave more than 1.5 of 24 bits unused\n")


@pytest.mark.long
def test_whole_sweep_with_parity_runs_and_a_second_call_starts_no_stage(tmp_path: Path) -> None:
    one_rank = {stage: {"ranks": 1} for stage in ("prepare", "encoder", "materialize", "ranker")}
    values = {
        "prepare": {
            "source": {"kind": "synthetic", "num_items": 600, "num_users": 80, "events_per_day": 400}
            | {"train_days": 3, "test_days": 2},
        },
        "encoder": {
            "network": {"embedding_width": 16, "categorical_width": 8, "hidden": 32},
            "quantizer": {"kind": "structured", "levels": 2, "depth": 1, "groups": 5, "group_dim": 2},
            "training": {"epochs": 2, "batch_size": 64},
        },
        "materialize": {"prefix_lengths": {"sid": [2, 5]}},
        "ranker": {"training": {"batch_size": 128, "warmup_steps": 2}},
        "run": {"name": "small", "runs_dir": f"{tmp_path}/runs", "launch": one_rank, "jobs": 2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    first = run_command("sidestack.pipelines.studies.sweep", tmp_path, "--bits", "8", "--levels", "16", "--parity")
    assert first.returncode == 0, first.stderr
    assert "parity: NE with the chosen setting" in first.stdout and "  click " in first.stdout
    (file,) = tmp_path.glob("runs/small/sweep/*/sweep.json")
    assert {one.setting.name for one in SweepResult.model_validate_json(file.read_bytes()).results} == {
        "l16_d1_g2", "l16_d2_g1",
    }  # fmt: skip
    again = run_command("sidestack.pipelines.studies.sweep", tmp_path, "--bits", "8", "--levels", "16", "--parity")
    assert again.returncode == 0 and " starts with " not in again.stderr
    assert again.stdout == first.stdout
