"""The files that the comparison stage writes."""

import csv
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from sidestack.infra.config import parse, plain
from sidestack.infra.manifest import read_manifest, verify
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.compare import compare
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.report.config import CompareConfig
from tests.pipelines import fabricated
from tests.pipelines.compare.running import over_none, run_compare
from tests.pipelines.fabricated import WORLD, predictions, ranker_output, truth

REQUIRED_METRICS = {"ne", "auc", "gauc", "calibration"}
REQUIRED_ARM_KEYS = {
    "tasks",
    "sid_table_bytes",
    "table_bytes",
    "feature_bytes_per_row",
    "samples_per_second",
    "peak_memory_bytes",
}


def test_comparison_has_the_required_keys_and_every_arm(comparison: dict[str, Any]) -> None:
    assert list(comparison["arms"]) == ["none", "sid_ngram", "side"]
    for arm in comparison["arms"].values():
        assert set(arm) >= REQUIRED_ARM_KEYS
        assert set(arm["tasks"]) == {"click", "conversion"}
        assert all(set(task["metrics"]) == REQUIRED_METRICS for task in arm["tasks"].values())
    assert comparison["arms"]["side"]["sid_table_bytes"] == 0
    assert re.fullmatch("[0-9a-f]{64}", comparison["config_digest"])
    assert "torch" in comparison["versions"]
    assert [(name, task["given"]) for name, task in comparison["tasks"].items()] == [
        ("click", None), ("conversion", "click"),
    ]  # fmt: skip


def test_data_and_trainings_are_reported(comparison: dict[str, Any], out: Path) -> None:
    events = pa.concat_tables([fabricated.training_events(0), fabricated.training_events(1)])
    assert comparison["trained_on"] == {
        "click": {"rows": 3000, "positives": pc.sum(events["click"]).as_py()},
        "conversion": {"rows": 0, "positives": 0},  # they have no label there
    }
    settings = {"steps": 3000, "epochs": 1, "batch_size": 1024, "sparse_learning_rate": 0.025}
    assert comparison["arms"]["side"]["training"].items() >= settings.items()
    assert "training.sparse_learning_rate: 0.05 in none, sid_ngram; 0.025 in side" in comparison["differs"]
    assert comparison["encoder"]["catalogue_items"] == 48
    assert "50.0 % of the catalogue's 48" in (out / "report.html").read_text()


def test_report_has_the_runs_file(
    replicated: dict[str, Path], thrice: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    page = (thrice / "report.html").read_text()
    text = html.unescape(re.findall(r"for <code>--config</code></summary><pre><code>(.*?)</code>", page, re.DOTALL)[0])
    values = yaml.safe_load(text)
    for section in ("prepare", "encoder"):
        values.pop(section)  # fabricated and incomplete
    config = parse(PipelineConfig, values, "pasted")
    assert config.arms == ("none", "sid_ngram", "side") and config.run.replicates == 3
    assert config.compare.resamples == 200 and config.materialize.prefix_lengths == {"sid": (5,)}
    for arm in config.arms:
        for replicate in range(3):
            assert plain(config.ranker_of(arm, replicate)) == fabricated.ranker_section(arm, replicate)
    assert yaml.safe_load(text)["prepare"]["source"] == {"kind": "synthetic", "num_items": 50}


def test_report_has_no_run_file_when_no_single_file_resolves_to_the_arms(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    section = fabricated.ranker_section("side")
    section["training"]["batch_size"] = 64
    odd = ranker_output(tmp_path / "side", "side", predictions(truth(), 0.45, 2), section=section)
    run_compare({**inputs, "arm.side.0": odd}, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "not one run's file: side differs from none in more than an arm may set for itself" in page
    assert "arms differ in training.batch_size: 1024 in none, sid_ngram; 64 in side" in page


def test_files_contain_the_same_numbers(out: Path, comparison: dict[str, Any]) -> None:
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    figures = {
        f"figures/{kind.format(task)}.png"
        for kind in ("ne_gain_{}", "learning_{}", "cost_{}", "reliability_{}", "segments_{}_user", "segments_{}_item")
        for task in ("click", "conversion")
    }
    expected = {"comparison.json", "summary.json", "table.txt", "table.md", "table.csv", "report.html"}
    assert names == expected | figures | {"figures/codebook_use.png"}
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert len(rows) == 6
    for row in rows:
        metrics = comparison["arms"][row["arm"]]["tasks"][row["task"]]["metrics"]
        assert {name: float(row[name]) for name in metrics} == {name: one["value"] for name, one in metrics.items()}
    gain = over_none(comparison, "side", "click", "ne")["gain"]
    assert f"{100 * gain:+.2f} % ?" in (out / "table.md").read_text()
    assert f"{100 * gain:+.2f} % ?" in (out / "report.html").read_text()
    assert f"{100 * gain:+.2f} %" not in (out / "table.txt").read_text()
    assert {row["verdict"] for row in rows if row["arm"] == "side"} == {"withheld"}


def test_equal_inputs_give_equal_bytes(inputs: dict[str, Path], out: Path, tmp_path: Path) -> None:
    run_compare(inputs, tmp_path / "again", draw=True)
    for path in out.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(out)).read_bytes() == path.read_bytes(), path


def test_an_arm_like_the_reference_is_marked_as_no_difference(inputs: dict[str, Path], tmp_path: Path) -> None:
    table = predictions(truth(), fabricated.ARMS["none"], 11)
    both = {**inputs, "arm.side.0": ranker_output(tmp_path / "side", "side", table)}
    run_compare(both, tmp_path / "out")
    text = (tmp_path / "out" / "table.txt").read_text()
    assert re.search(r"^side .* % ~ ", text, re.MULTILINE)
    assert "~ the interval holds 0" in text
    assert "no difference shown" in (tmp_path / "out" / "report.html").read_text()


def test_other_ranks_write_nothing(inputs: dict[str, Path], tmp_path: Path) -> None:
    from dataclasses import replace

    second = replace(WORLD, rank=1, size=2)
    compare(StageRun(CompareConfig(), inputs, tmp_path, second, RunLog(None)))
    assert list(tmp_path.iterdir()) == []


def test_command_commits_and_prints_the_table(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("compare: {resamples: 200}\n")
    pairs = [part for name, path in inputs.items() for part in ("--input", f"{name}={path}")]
    command = [sys.executable, "-m", "sidestack.pipelines.compare", "--config", str(tmp_path / "run.yaml"), *pairs]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "out" / "table.txt").read_text() + "\n"
    assert "\x1b" not in done.stdout
    manifest = verify(tmp_path / "out")
    assert (
        manifest.facts["config_digest"]
        == json.loads((tmp_path / "out" / "comparison.json").read_text())["config_digest"]
    )
    assert manifest.inputs["arm.side.0"] == read_manifest(inputs["arm.side.0"]).digest
    assert pq.read_table(inputs["arm.side.0"] / "predictions").num_rows == 4000
