"""The comparison stage over fabricated outputs: its numbers, its refusals, its files."""

import csv
import html
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from sidestack.infra.config import parse, plain
from sidestack.infra.errors import DataError
from sidestack.infra.manifest import read_manifest, verify
from sidestack.infra.stage import StageRun
from sidestack.infra.tables import TaskSpec
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.compare import compare
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.report.comparison import Comparison
from sidestack.pipelines.report.config import CompareConfig
from sidestack.pipelines.tables.config import TableConfig
from sidestack.pipelines.tables.page import as_page
from sidestack.ranker.metric_registry import Metric, all_metrics
from sidestack.ranker.metrics import prediction_metrics
from sidestack.ranker.statistics import RowTally, log_loss
from tests.pipelines import fabricated
from tests.pipelines.fabricated import WORLD, all_inputs, predictions, ranker_output, truth
from tests.ranker.in_memory import auc_by_user, task_metrics

REQUIRED_METRICS = {"ne", "auc", "gauc", "calibration"}
REQUIRED_ARM_KEYS = {
    "tasks",
    "sid_table_bytes",
    "table_bytes",
    "feature_bytes_per_row",
    "samples_per_second",
    "peak_memory_bytes",
}


def run_compare(inputs: dict[str, Path], out: Path, draw: bool = False, **config: Any) -> dict[str, Any]:
    """Run the stage's body on one rank and return `comparison.json`; `draw` draws the figures, which take seconds."""
    out.mkdir()
    settings = CompareConfig(**{"resamples": 200, **config})
    drawing = nullcontext() if draw else patch("sidestack.pipelines.compare.plots", return_value=())
    with drawing:
        compare(StageRun(settings, inputs, out, WORLD, RunLog(out)))
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return all_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def out(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "out"
    run_compare(inputs, folder, draw=True)
    return folder


@pytest.fixture(scope="module")
def comparison(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def over_none(comparison: dict[str, Any], arm: str, task: str, metric: str) -> dict[str, Any]:
    """Return an arm's gain over the arm `none`."""
    found: dict[str, Any] = comparison["arms"][arm]["tasks"][task]["metrics"][metric]["over"]["none"]
    return found


def judged(drawn: dict[str, Any], table: pa.Table, task: str) -> tuple[Any, Any, Any]:
    """Return the labels, scores and users of the rows that have a label of a task."""
    keep = drawn[task] >= 0
    return drawn[task][keep], table[f"p_{task}"].to_numpy()[keep], drawn["user_id"][keep]


def test_metrics_match_the_predictions(comparison: dict[str, Any]) -> None:
    drawn = truth()
    tables = {arm: predictions(drawn, noise, seed) for seed, (arm, noise) in enumerate(fabricated.ARMS.items())}
    for task in ("click", "conversion"):
        measured = {arm: task_metrics(*judged(drawn, table, task)[:2]) for arm, table in tables.items()}
        for arm, metrics in measured.items():
            found = comparison["arms"][arm]["tasks"][task]
            assert (found["num"], found["positives"]) == (metrics.num, metrics.positives)
            values = {name: one["value"] for name, one in found["metrics"].items()}
            assert values["ne"] == pytest.approx(metrics.ne, rel=1e-12)
            assert values["auc"] == pytest.approx(metrics.auc, rel=1e-12)
            assert values["calibration"] == pytest.approx(metrics.calibration, rel=1e-12)
            if arm != "none":
                gain = found["metrics"]["ne"]["over"]["none"]["gain"]
                assert gain == pytest.approx(1 - values["ne"] / measured["none"].ne, abs=1e-12)


def test_intervals_match_a_plain_paired_bootstrap_over_users(comparison: dict[str, Any]) -> None:
    drawn = truth()
    users_N = drawn["user_id"]
    losses = [
        log_loss(drawn["click"], predictions(drawn, fabricated.ARMS[arm], seed)["p_click"].to_numpy())
        for seed, arm in ((0, "none"), (2, "side"))
    ]
    by_user = [[loss[users_N == user].sum() for user in np.unique(users_N)] for loss in losses]
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(200):
        drawn_users = rng.integers(0, len(by_user[0]), len(by_user[0]))
        gains.append(1 - np.sum(np.array(by_user[1])[drawn_users]) / np.sum(np.array(by_user[0])[drawn_users]))
    found = over_none(comparison, "side", "click", "ne")["interval"]
    assert found == pytest.approx(np.quantile(gains, [0.025, 0.975], method="hazen").tolist(), abs=1e-9)


def test_gauc_and_deciles_match_the_predictions(comparison: dict[str, Any]) -> None:
    drawn = truth()
    for seed, (arm, noise) in enumerate(fabricated.ARMS.items()):
        labels, scores, users = judged(drawn, predictions(drawn, noise, seed), "conversion")
        found = comparison["arms"][arm]["tasks"]["conversion"]
        expected = auc_by_user(users, labels, scores)
        gauc = found["metrics"]["gauc"]
        assert gauc["value"] == pytest.approx(expected.gauc)
        assert gauc["counts"] == {"users": len(expected.users_V), "rows": expected.rows_V.sum()}
        assert [one["rows"] for one in found["deciles"]] == [len(part) for part in np.array_split(labels, 10)]
        assert [one["predicted"] for one in found["deciles"]] == sorted(one["predicted"] for one in found["deciles"])
        assert sum(one["observed"] * one["rows"] for one in found["deciles"]) == pytest.approx(labels.sum())


def test_gauc_gain_is_relative_with_an_interval_over_users(comparison: dict[str, Any]) -> None:
    side, none = (comparison["arms"][arm]["tasks"]["click"]["metrics"]["gauc"] for arm in ("side", "none"))
    gain = side["over"]["none"]
    assert gain["gain"] == pytest.approx(side["value"] / none["value"] - 1)
    assert 0 < gain["interval"][0] < gain["gain"] < gain["interval"][1]
    assert "none" not in none["over"] and gain["seeds"] is None
    drawn = truth()
    users, aucs = None, []
    for seed, arm in ((2, "side"), (0, "none")):
        labels, scores, of_rows = judged(drawn, predictions(drawn, fabricated.ARMS[arm], seed), "click")
        found = auc_by_user(of_rows, labels, scores)
        users = np.zeros(len(np.unique(of_rows)))
        users[np.searchsorted(np.unique(of_rows), found.users_V)] = found.auc_V * found.rows_V
        aucs.append(users)
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(aucs[0]), len(aucs[0])) for _ in range(200)]
    gains = [aucs[0][drawn_users].sum() / aucs[1][drawn_users].sum() - 1 for drawn_users in draws]
    assert gain["interval"] == pytest.approx(np.quantile(gains, [0.025, 0.975], method="hazen").tolist(), abs=1e-9)


def test_auc_gain_is_relative_with_the_interval_of_a_bootstrap_over_users(comparison: dict[str, Any]) -> None:
    side, none = (comparison["arms"][arm]["tasks"]["click"]["metrics"]["auc"] for arm in ("side", "none"))
    gain = side["over"]["none"]
    assert gain["gain"] == pytest.approx(side["value"] / none["value"] - 1)
    assert "none" not in none["over"] and gain["seeds"] is None
    drawn = truth()
    users_N, labels_N = drawn["user_id"], drawn["click"]
    scores = {
        arm: predictions(drawn, fabricated.ARMS[arm], seed)["p_click"].to_numpy()
        for seed, arm in ((0, "none"), (2, "side"))
    }
    rows_of = [np.flatnonzero(users_N == user) for user in np.unique(users_N)]
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(200):
        rows = np.concatenate([rows_of[user] for user in rng.integers(0, len(rows_of), len(rows_of))])
        aucs = {arm: task_metrics(labels_N[rows], of_arm[rows]).auc for arm, of_arm in scores.items()}
        assert aucs["side"] and aucs["none"]
        gains.append(aucs["side"] / aucs["none"] - 1)
    # Equal to first order for the same resamples: the bounds differ by a small part of the interval's width.
    low, high = np.quantile(gains, [0.025, 0.975], method="hazen")
    assert gain["interval"] == pytest.approx([low, high], abs=0.03 * (high - low))


def slow_segment(clicks: int) -> str:
    return "0" if clicks == 0 else "1-2" if clicks < 3 else "3-9" if clicks < 10 else "10+"


@pytest.mark.parametrize("kind", ["user", "item"])
def test_segments_group_rows_by_the_positives_of_the_training_dates(comparison: dict[str, Any], kind: str) -> None:
    earlier = pa.concat_tables([fabricated.training_events(0), fabricated.training_events(1)])
    clicks = Counter(earlier.filter(pc.equal(earlier["click"], 1))[f"{kind}_id"].to_pylist())
    drawn = truth()
    losses = {
        arm: log_loss(drawn["click"], predictions(drawn, noise, seed)["p_click"].to_numpy())
        for seed, (arm, noise) in enumerate(fabricated.ARMS.items())
    }
    place = np.array([slow_segment(clicks[number]) for number in drawn[f"{kind}_id"].tolist()])
    found = comparison["arms"]["side"]["tasks"]["click"]["segments"][kind]
    assert [one["name"] for one in found] == ["0", "1-2", "3-9", "10+"]
    assert sum(one["rows"] > 0 for one in found) >= 3
    for one in found:
        inside = place == one["name"]
        assert one["rows"] == inside.sum() and one["positives"] == drawn["click"][inside].sum()
        assert one["users"] == len(np.unique(drawn["user_id"][inside]))
        if one["gain"]:
            expected = 1 - losses["side"][inside].sum() / losses["none"][inside].sum()
            assert one["gain"]["gain"] == pytest.approx(expected)
            assert one["gain"]["interval"][0] < expected < one["gain"]["interval"][1]
    reference = comparison["arms"]["none"]["tasks"]["click"]["segments"][kind]
    assert [one["gain"] for one in reference] == [None] * 4


def test_an_id_outside_the_dataset_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    table = one_value("item_id", 7, 50)(predictions(truth(), 0.9, 0))
    odd = ranker_output(tmp_path / "none", "none", table)
    with pytest.raises(DataError, match=r"item_id 50 is outside the dataset's table \[0, 50\)"):
        run_compare({**inputs, "arm.none.0": odd}, tmp_path / "out")


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return all_inputs(tmp_path_factory.mktemp("replicated"), replicates=3)


@pytest.fixture(scope="module")
def thrice(replicated: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thrice") / "out"
    run_compare(replicated, folder, draw=True)
    return folder


def test_replicates_are_averaged_with_the_spread_over_trainings(thrice: Path) -> None:
    found = json.loads((thrice / "comparison.json").read_text())
    drawn = truth()
    by_arm = {
        arm: [task_metrics(*judged(drawn, predictions(drawn, noise, place + 10 * r), "click")[:2]) for r in range(3)]
        for place, (arm, noise) in enumerate(fabricated.ARMS.items())
    }
    side = found["arms"]["side"]["tasks"]["click"]["metrics"]
    in_ne, in_auc = side["ne"]["over"]["none"], side["auc"]["over"]["none"]
    nes = {arm: [metrics.ne for metrics in measured] for arm, measured in by_arm.items()}
    gains = [1 - mine / theirs for mine, theirs in zip(nes["side"], nes["none"], strict=True)]
    assert found["replicates"] == 3
    assert side["ne"]["replicates"] == pytest.approx(nes["side"])
    assert in_ne["gain"] == pytest.approx(1 - np.mean(nes["side"]) / np.mean(nes["none"]))
    assert in_ne["replicates"] == pytest.approx(gains)
    assert in_ne["seeds"] == pytest.approx(np.std(gains, ddof=1))
    for name in ("ne", "auc", "calibration"):
        assert side[name]["value"] == pytest.approx(np.mean([getattr(metrics, name) for metrics in by_arm["side"]]))
    aucs = {arm: np.array([metrics.auc for metrics in measured]) for arm, measured in by_arm.items()}
    assert in_auc["gain"] == pytest.approx(aucs["side"].mean() / aucs["none"].mean() - 1)
    assert in_auc["seeds"] == pytest.approx(np.std(aucs["side"] / aucs["none"], ddof=1))
    assert in_auc["interval"][0] < in_auc["gain"] < in_auc["interval"][1]


def test_replicates_are_shown_in_the_tables(thrice: Path) -> None:
    text = (thrice / "table.txt").read_text()
    assert "the interval is over users and 3 trainings, ± seeds its deviation over trainings" in text
    assert re.search(r"^side .* to .* % +0\.\d\d %  ", text, re.MULTILINE)
    assert "training 2" in (thrice / "report.html").read_text()
    assert "one training" not in text and "side: click better" in text.replace("conversion", "")


def test_one_training_is_reported_as_no_result(out: Path) -> None:
    for name in ("table.txt", "table.md", "report.html"):
        text = (out / name).read_text()
        assert "withheld (one training: not a result)" in text and " better, " not in text
        assert "one training: the interval is over users, it does not hold the spread of" in text


def test_costs_over_replicates_are_medians(replicated: dict[str, Path], tmp_path: Path) -> None:
    given = dict(replicated)
    for replicate, (speed, memory) in enumerate([(100.0, 5), (9000.0, 7), (120.0, 900)]):
        table = predictions(truth(), 0.45, 2 + 10 * replicate)
        summary = {"samples_per_second": speed, "peak_memory_bytes": memory}
        given[f"arm.side.{replicate}"] = ranker_output(tmp_path / f"s{replicate}", "side", table, summary=summary)
    side = run_compare(given, tmp_path / "out")["arms"]["side"]
    assert (side["samples_per_second"], side["peak_memory_bytes"]) == (120.0, 7)
    assert side["flops_per_sample"] == 251_000.0


def test_replicates_that_cannot_be_compared_are_refused(
    inputs: dict[str, Path], replicated: dict[str, Path], tmp_path: Path
) -> None:
    without = {name: path for name, path in replicated.items() if name != "arm.sid_ngram.1"}
    with pytest.raises(DataError, match=r"arm 'sid_ngram': replicate 1 is missing; .* replicates 0 to 2"):
        run_compare(without, tmp_path / "a")
    for name in ("arm.side", "arm.side.x", "arm.side.01", "arm..0"):
        with pytest.raises(DataError, match=rf"input '{name}': must be named arm.<name>.<replicate>"):
            run_compare({**inputs, name: inputs["arm.side.0"]}, tmp_path / name)
    twin = {**replicated, "arm.side.2": replicated["arm.side.0"]}
    with pytest.raises(DataError, match=r"arm 'side': replicates 0 and 2 have the same configuration and data"):
        run_compare(twin, tmp_path / "b")
    fewer = ranker_output(tmp_path / "fewer", "side", predictions(truth(), 0.45, 12).slice(1))
    with pytest.raises(DataError, match=r"cannot be paired: 3,999 predicted rows against 4,000"):
        run_compare({**replicated, "arm.side.1": fewer}, tmp_path / "c")


def test_arms_of_different_dates_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    dates = {"train": ["2017-09-10", "2017-11-04"], "held_out": ["2017-11-12", "2017-12-09"]}
    odd = ranker_output(tmp_path / "side", "side", predictions(truth(), 0.5, 0), summary={"dates": dates})
    with pytest.raises(DataError, match=r"different dates \(.*; side: 2017-09-10 to 2017-11-04\)"):
        run_compare({**inputs, "arm.side.0": odd}, tmp_path / "out")


def test_replicates_with_different_datasets_give_a_warning(replicated: dict[str, Path], tmp_path: Path) -> None:
    given = dict(replicated)
    for arm in fabricated.ARMS:
        dataset = "other" if arm == "side" else "one"
        given[f"arm.{arm}.1"] = ranker_output(tmp_path / arm, arm, predictions(truth(), 0.5, 11), dataset=dataset)
    warnings = run_compare(given, tmp_path / "out")["warnings"]
    assert warnings == ["arm side was trained on another dataset than none in replicate 1"]


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


def test_side_is_better_and_the_reference_has_no_gain(comparison: dict[str, Any]) -> None:
    arms = {arm: values["tasks"]["click"]["metrics"]["ne"] for arm, values in comparison["arms"].items()}
    assert set(arms["none"]["over"]) == {"sid_ngram", "side"}
    assert arms["side"]["over"]["none"]["interval"][0] > 0
    over = arms["side"]["over"]["sid_ngram"]
    assert over["gain"] == pytest.approx(1 - arms["side"]["value"] / arms["sid_ngram"]["value"])


def test_roi_is_the_mean_judged_gain_per_kib(thrice: Path, comparison: dict[str, Any]) -> None:
    found = json.loads((thrice / "comparison.json").read_text())
    arm = found["arms"]["side"]
    gains = [over_none(found, "side", task, "ne")["gain"] for task in arm["tasks"]]
    assert arm["roi"] == pytest.approx(sum(gains) / 2 / (408 / 1024)) and arm["roi_withheld"] == ""
    assert found["arms"]["none"]["roi"] is None and found["arms"]["none"]["roi_withheld"] == ""
    once = comparison["arms"]["side"]
    assert (once["roi"], once["roi_withheld"]) == (None, "gains are withheld")


def test_verdict_is_withheld_without_convergence(replicated: dict[str, Path], tmp_path: Path) -> None:
    given = dict(replicated)
    for replicate in range(3):
        table, section = predictions(truth(), 0.45, 2 + 10 * replicate), fabricated.ranker_section("side", replicate)
        falling = [{"step": 50 * n, "train_click_ne": 1 - 0.1 * n, "train_conversion_ne": 0.8} for n in range(1, 9)]
        path = tmp_path / f"side{replicate}"
        given[f"arm.side.{replicate}"] = ranker_output(path, "side", table, history=falling, section=section)
    found = run_compare(given, tmp_path / "out")["arms"]["side"]["tasks"]
    assert found["click"]["verdict"]["kind"] == "withheld"
    assert found["click"]["verdict"]["reasons"] == [
        "side has not converged: training NE fell by 44.4 % in the last quarter"
    ]
    assert found["conversion"]["verdict"] == {"kind": "better", "reasons": []}
    assert over_none({"arms": {"side": {"tasks": found}}}, "side", "click", "ne")["gain"] > 0


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


def test_the_number_of_ranks_that_wrote_predictions_does_not_matter(
    inputs: dict[str, Path], comparison: dict[str, Any], tmp_path: Path
) -> None:
    arms = {
        f"arm.{arm}.0": ranker_output(tmp_path / arm, arm, predictions(truth(), noise, seed), ranks=seed + 1)
        for seed, (arm, noise) in enumerate(fabricated.ARMS.items())
    }
    again = run_compare({**inputs, **arms}, tmp_path / "out")
    assert again["arms"] == comparison["arms"]


def test_rows_without_a_label_do_not_count(inputs: dict[str, Path], comparison: dict[str, Any], tmp_path: Path) -> None:
    def unlabelled_to_zero(table: pa.Table) -> pa.Table:
        scores = np.where(truth()["conversion"] >= 0, table["p_conversion"].to_numpy(), 0.0)
        return with_column(table, "p_conversion", pa.array(scores, pa.float32()))

    moved = {**inputs, "arm.side.0": altered(tmp_path / "side", unlabelled_to_zero)}
    again = run_compare(moved, tmp_path / "out")
    assert again["arms"]["side"]["tasks"] == comparison["arms"]["side"]["tasks"]


def test_another_reference_reverses_the_gains(
    inputs: dict[str, Path], comparison: dict[str, Any], tmp_path: Path
) -> None:
    found = run_compare(inputs, tmp_path / "out", reference="side")
    assert list(found["arms"]) == ["side", "none", "sid_ngram"]
    assert found["arms"]["none"]["tasks"]["click"]["metrics"]["ne"]["over"]["side"]["gain"] < 0
    assert found["config_digest"] != comparison["config_digest"]


def test_an_arm_like_the_reference_is_marked_as_no_difference(inputs: dict[str, Path], tmp_path: Path) -> None:
    table = predictions(truth(), fabricated.ARMS["none"], 11)
    both = {**inputs, "arm.side.0": ranker_output(tmp_path / "side", "side", table)}
    run_compare(both, tmp_path / "out")
    text = (tmp_path / "out" / "table.txt").read_text()
    assert re.search(r"^side .* % ~ ", text, re.MULTILINE)
    assert "~ the interval holds 0" in text
    assert "no difference shown" in (tmp_path / "out" / "report.html").read_text()


def test_task_without_positives_is_reported_as_undefined(tmp_path: Path) -> None:
    drawn = truth()
    drawn["conversion"] = np.minimum(drawn["conversion"], 0)
    arms = {
        f"arm.{arm}.0": ranker_output(tmp_path / arm, arm, predictions(drawn, noise, 0))
        for arm, noise in fabricated.ARMS.items()
    }
    found = run_compare({**arms, **fabricated.other_inputs(tmp_path)}, tmp_path / "out", draw=True)
    for arm in found["arms"].values():
        conversion = arm["tasks"]["conversion"]
        assert conversion["positives"] == 0 and conversion["num"] > 0
        assert [one["value"] for one in conversion["metrics"].values()] == [None] * 4
        assert [one["over"] for one in conversion["metrics"].values()] == [{}] * 4
    for name in ("table.txt", "table.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "undefined (no positives)" in text
        assert "nan" not in re.sub('base64,[^"]*', "", text).lower()
    assert not (tmp_path / "out" / "figures" / "ne_gain_conversion.png").exists()


def test_differences_other_than_the_arm_give_warnings(inputs: dict[str, Path], tmp_path: Path, capfd: Any) -> None:
    table = predictions(truth(), 0.5, 0)
    odd = ranker_output(tmp_path / "side", "side", table, summary={"world_size": 8}, dataset="another")
    found = run_compare({**inputs, "arm.side.0": odd}, tmp_path / "out")
    assert "different numbers of ranks (none 2, sid_ngram 2, side 8)" in found["warnings"][0]
    assert "arm side was trained on another dataset" in found["warnings"][1]
    shown = capfd.readouterr().out
    assert all(warning in shown for warning in found["warnings"][:1])


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def altered(path: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Commit the arm `side` with its predictions changed."""
    return ranker_output(path, "side", change(predictions(truth(), fabricated.ARMS["side"], 2)))


def one_value(name: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    """Change one row's value of a column."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        return with_column(table, name, pa.array(values, table.schema.field(name).type))

    return change


CLICKED = int(np.flatnonzero(truth()["click"] == 1)[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(1), r"cannot be paired: 3,999 predicted rows against 4,000"),
        (one_value("click", CLICKED, 0), rf"row {CLICKED} has click 0 against 1"),
        (one_value("conversion", CLICKED, None), rf"row {CLICKED} has conversion null against [01]"),
        (one_value("user_id", 7, 399_999), r"row 7 has user_id 399999 against \d+"),
        (one_value("row", 7, 4000), r"row 7 has row 8 against 7"),
        (one_value("row", 7, 8), r"row 8 was predicted more than once"),
        (one_value("click", 7, 2), r"row group 0: column 'click' holds 2; must be 0, 1 or null"),
        (one_value("p_click", 7, 1.5), r"row group 0: column 'p_click' holds 1.5; must be a probability"),
        (one_value("p_click", 7, float("nan")), r"column 'p_click' holds nan; must be a probability"),
        (one_value("p_click", 7, None), r"column 'p_click' has 1 nulls; none may be"),
        (lambda table: table.drop_columns(["p_conversion"]), r"column 'p_conversion' is missing"),
        (lambda table: table.slice(0, 0), r"predictions: holds no row"),
    ],
)
def test_predictions_that_cannot_be_paired_are_refused(
    inputs: dict[str, Path], tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    bad = {**inputs, "arm.side.0": altered(tmp_path / "side", change)}
    with pytest.raises(DataError, match=message):
        run_compare(bad, tmp_path / "out")
    assert not (tmp_path / "out" / "comparison.json").exists()


def test_order_of_the_rows_does_not_matter(inputs: dict[str, Path], comparison: dict[str, Any], tmp_path: Path) -> None:
    shuffled = np.random.default_rng(0).permutation(4000)
    same = {**inputs, "arm.side.0": altered(tmp_path / "side", lambda table: table.take(pa.array(shuffled)))}
    assert run_compare(same, tmp_path / "out")["arms"] == comparison["arms"]


def test_rows_that_were_read_and_not_predicted_are_detected(inputs: dict[str, Path], tmp_path: Path) -> None:
    table = predictions(truth(), 0.45, 2)
    for read in (4000, 4001):
        path = ranker_output(tmp_path / f"{read}", "side", table, summary={"held_out_rows": read})
        given = {**inputs, "arm.side.0": path}
        if read == 4000:
            run_compare(given, tmp_path / "out")
            continue
        with pytest.raises(DataError, match=r"arm.side.0: 4,000 rows are predicted, .* says that 4,001 were read"):
            run_compare(given, tmp_path / "odd")


CHAIN = {"view": TaskSpec(), "basket": TaskSpec(given="view"), "order": TaskSpec(given="basket")}


@pytest.mark.parametrize(
    "tasks",
    [
        {"order": TaskSpec()},
        CHAIN,
        {"share": TaskSpec(given="like"), "like": TaskSpec(), "view": TaskSpec()},  # two roots, the child named first
    ],
    ids=["one", "chain", "two roots"],
)
def test_a_comparison_follows_the_tasks_of_the_dataset(tmp_path: Path, tasks: dict[str, TaskSpec]) -> None:
    found = run_compare(fabricated.inputs_of_tasks(tmp_path, tasks), tmp_path / "out", draw=True)
    root = next(name for name, task in tasks.items() if task.given is None)
    assert list(found["tasks"]) == list(tasks) and found["earlier_task"] == root
    for arm, noise in fabricated.ARMS.items():
        table = fabricated.table_of_tasks(tasks, noise, list(fabricated.ARMS).index(arm))
        assert list(found["arms"][arm]["tasks"]) == list(tasks)
        for task, result in found["arms"][arm]["tasks"].items():
            judged_rows = table.filter(table[task].is_valid())
            expected = task_metrics(judged_rows[task].to_numpy(), judged_rows[f"p_{task}"].to_numpy())
            assert (result["num"], result["positives"]) == (expected.num, expected.positives)
            assert result["metrics"]["ne"]["value"] == pytest.approx(expected.ne, rel=1e-12)
            assert result["metrics"]["auc"]["value"] == pytest.approx(expected.auc, rel=1e-12)
    text = (tmp_path / "out/table.txt").read_text()
    assert re.findall(r"^(\w+) +NE  ", text, re.MULTILINE) == list(tasks)
    rules = [len(line) for line in text.splitlines() if "─" in line]
    assert len(rules) == 3 + len(tasks) and len(set(rules[2:])) == 1  # below rates and training: results, one grid
    page, names = (
        (tmp_path / "out/report.html").read_text(),
        {path.stem for path in (tmp_path / "out/figures").iterdir()},
    )
    kinds = ("ne_gain_{}", "learning_{}", "cost_{}", "reliability_{}", "segments_{}_user", "segments_{}_item")
    assert names == {kind.format(task) for kind in kinds for task in tasks} | {"codebook_use"}
    assert f"rows with {root} = 1" in page and "click" not in re.sub('base64,[^"]*', "", page + text)


def test_a_dataset_without_tasks_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    dataset = fabricated.dataset_output(tmp_path / "dataset", {})
    with pytest.raises(DataError, match="dataset.json names no tasks"):
        run_compare({**inputs, "dataset": dataset}, tmp_path / "out")


ACCURACY = Metric(
    "accuracy",
    "accuracy",
    partial(
        RowTally,
        value=lambda labels_M, scores_M: ((scores_M >= 0.5) == labels_M).astype(np.float64),
        scale=lambda num, positives: float(num) or None,
    ),
    better="higher",
    note="share of rows on the right side of one half",
)


def test_registered_metric_appears_in_all_outputs(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(all_metrics(), "accuracy", ACCURACY)
    found = run_compare(inputs, tmp_path / "out")
    drawn, values = truth(), {}
    for seed, (arm, noise) in enumerate(fabricated.ARMS.items()):
        table = predictions(drawn, noise, seed)
        values[arm] = np.mean((table["p_click"].to_numpy() >= 0.5) == drawn["click"])
        assert found["arms"][arm]["tasks"]["click"]["metrics"]["accuracy"]["value"] == pytest.approx(values[arm])
        assert prediction_metrics(inputs[f"arm.{arm}.0"], ("click",))["click"]["accuracy"] == pytest.approx(values[arm])
    gain = over_none(found, "side", "click", "accuracy")
    assert gain["gain"] == pytest.approx(values["side"] / values["none"] - 1)
    assert gain["interval"][0] < gain["gain"] < gain["interval"][1]
    text = (tmp_path / "out/table.txt").read_text()
    assert re.search(rf"^side .* {values['side']:.4f}$", text, re.MULTILINE)
    assert "accuracy: share of rows on the right side of one half" in text
    assert "accuracy gain" in (tmp_path / "out/table.md").read_text()
    assert "accuracy gain" in (tmp_path / "out/report.html").read_text()
    rows = {(row["arm"], row["task"]): row for row in csv.DictReader((tmp_path / "out/table.csv").open())}
    assert float(rows["side", "click"]["accuracy_gain_low"]) == gain["interval"][0]
    table = TableConfig.model_validate({"title": "T", "arms": [*fabricated.ARMS], "metric": "accuracy", "differs": ""})
    page = as_page({"t": table}, {"t": Comparison.read(tmp_path / "out")}, {"t": "abc"})
    assert "| click accuracy gain |" in page and "accuracy / accuracy(reference) - 1" in page


def test_inputs_that_are_not_valid_arms_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    without = {name: path for name, path in inputs.items() if name != "arm.none.0"}
    with pytest.raises(DataError, match=r"reference='none': must be one of the arms given \(sid_ngram, side\)"):
        run_compare(without, tmp_path / "a")
    with pytest.raises(DataError, match="holds the arm 'sid_ngram', was given as arm.side.0"):
        run_compare({**inputs, "arm.side.0": inputs["arm.sid_ngram.0"]}, tmp_path / "b")
    with pytest.raises(DataError, match="summary.json: not a ranker's summary: arm: Field required"):
        run_compare({**inputs, "arm.side.0": inputs["encoder.sid"]}, tmp_path / "c")
    with pytest.raises(DataError, match="predictions: holds no Parquet file"):
        bare = ranker_output(tmp_path / "bare", "side", predictions(truth(), 0.5, 0), ranks=0)
        run_compare({**inputs, "arm.side.0": bare}, tmp_path / "d")


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
