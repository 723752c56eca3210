"""The comparison stage on several trainings of each arm."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidestack.infra.errors import DataError
from tests.pipelines import fabricated
from tests.pipelines.compare.running import judged, over_none, run_compare
from tests.pipelines.fabricated import predictions, ranker_output, truth
from tests.ranker.in_memory import task_metrics


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


def test_replicates_with_different_datasets_give_a_warning(replicated: dict[str, Path], tmp_path: Path) -> None:
    given = dict(replicated)
    for arm in fabricated.ARMS:
        dataset = "other" if arm == "side" else "one"
        given[f"arm.{arm}.1"] = ranker_output(tmp_path / arm, arm, predictions(truth(), 0.5, 11), dataset=dataset)
    warnings = run_compare(given, tmp_path / "out")["warnings"]
    assert warnings == ["arm side was trained on another dataset than none in replicate 1"]


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
