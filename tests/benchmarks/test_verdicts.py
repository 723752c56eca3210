"""The sweep of verdicts: counts of wrong verdicts, checked by hand, and a quick run."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sidestack.benchmarks import contest, verdicts
from sidestack.benchmarks.contest import LogSize
from sidestack.benchmarks.record import Row
from sidestack.benchmarks.verdicts import (
    REPORTED,
    WAYS,
    Truth,
    count,
    goals,
    judge_gains,
    main,
    reason_rows,
    truth,
    verdict_rows,
)
from sidestack.pipelines.report.verdict import ONE_TRAINING

SIZE = LogSize(events=1200, items=100, users=20)
GROUP = (1200, 100, "explains", "click")


def row(verdict: str, gain: float | None = 0.01, **changes: Any) -> Row:
    low, high = (None, None) if gain is None else (gain - 0.02, gain + 0.02)
    found = {"events": 1200, "items": 100, "content": "explains", "task": "click", "seeds": 0.01, "why": []}
    return {**found, **REPORTED._asdict(), "gain": gain, "low": low, "high": high, "verdict": verdict, **changes}


def test_truth_is_the_mean_over_logs_with_its_significance() -> None:
    found = truth([0.02, 0.03, 0.04])
    assert found == pytest.approx((0.03, 0.01 / 3**0.5, "better"))
    assert truth([-0.02, -0.03, -0.04]).kind == "worse"
    assert truth([0.0, 0.03, 0.05]).kind == "neither"  # 4.3 standard errors are 6 %
    assert truth([0.03]) == Truth(0.03, None, None)


@pytest.mark.parametrize(("kind", "wrong"), [("better", 1), ("worse", 2), ("neither", 3)])
def test_verdict_is_wrong_unless_it_has_the_sign_of_the_truth(kind: str, wrong: int) -> None:
    rows = [row("better"), row("better"), row("worse", -0.05), row("no difference shown"), row("withheld")]
    found = count(rows, {GROUP: Truth(0.02, 0.001, kind)})
    assert (found["gains"], found["better"], found["worse"], found["no difference shown"]) == (5, 2, 1, 1)
    assert (found["withheld"], found["wrong"], found["wrong_share"]) == (1, wrong, wrong / 4)
    assert found["holds_mean"] == 4 / 5
    assert found["wrong_low"] < wrong / 4 < found["wrong_high"]


def test_verdict_is_not_counted_as_wrong_when_the_truth_is_unknown() -> None:
    found = count([row("better")], {GROUP: Truth(0.02, None, None)})
    assert (found["better"], found["wrong"], found["wrong_share"], found["holds_mean"]) == (1, 0, None, None)


def test_bounds_of_zero_wrong_verdicts_are_clopper_pearson() -> None:
    found = count([row("no difference shown")] * 72, {GROUP: Truth(0.0, 0.001, "neither")})
    assert (found["wrong_low"], found["wrong_high"]) == (0.0, pytest.approx(1 - 0.025 ** (1 / 72)))


def test_verdicts_are_counted_by_group_and_overall() -> None:
    rows = [row("better", gain) for gain in (0.02, 0.021, 0.022)]
    rows += [row("worse", gain, content="exchanged") for gain in (0.001, -0.001)]
    found = verdict_rows(rows, REPORTED)
    assert [(one.get("events"), one["content"], one["gains"], one["wrong"]) for one in found] == [
        (1200, "explains", 3, 0), (1200, "exchanged", 2, 2), (None, "explains", 3, 0), (None, "exchanged", 2, 2),
    ]  # fmt: skip
    (only,) = goals(rows)
    assert (only["ratio"], only["met"]) == (0.6, "no") and only["low"] < 0.6 < only["high"]


def test_reasons_are_counted_by_size_and_task() -> None:
    withheld = [
        row("withheld", why=["few rows", "not learned"]),
        row("withheld", content="exchanged", why=["few rows"]),
    ]
    assert reason_rows([*withheld, row("better")]) == [
        {"events": 1200, "items": 100, "task": "click", "gains": 3, "withheld": 2, "few rows": 2, "not learned": 1}
    ]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keep = tmp_path_factory.mktemp("kept")
    verdicts.contest(keep, SIZE, 0)
    return keep


@pytest.mark.slow
def test_verdict_of_one_training_is_computed_though_it_would_be_withheld(kept: Path) -> None:
    both = verdicts.contest(kept, SIZE, 0)
    assert {number: comparison.replicates for number, comparison in both.items()} == {2: 2, 1: 1}
    rows = [one for number, comparison in both.items() for one in judge_gains(comparison, number)]
    assert len(rows) == len(WAYS) * 2 * 2
    shown = [one for one in rows if one["gain"] is not None and not one["doubts"]]
    assert all(one["verdict"] != "withheld" for one in shown) and shown
    first, second = (
        {arm: one.tasks["click"].gain("ne", "none") for arm, one in both[number].arms.items() if arm != "none"}
        for number in (2, 1)
    )
    for arm, gain in second.items():
        assert gain is not None and first[arm] is not None
        assert gain.gain == pytest.approx(first[arm].replicates[0])
        reported = both[1].arms[arm].tasks["click"].verdict
        assert reported is not None and (gain.holds_zero or ONE_TRAINING in reported.reasons)


@pytest.mark.slow
def test_quick_run_reuses_kept_trainings_and_writes_its_tables(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "QUICK", (verdicts.Sizes(SIZE, 1),))
    monkeypatch.setattr(contest, "run_stage", None)
    monkeypatch.setattr(sys, "argv", ["verdicts", "--quick", "--keep", str(kept), "--out", str(tmp_path)])
    main()
    written = json.loads((tmp_path / "verdicts.json").read_text())["rows"]
    assert {one["table"] for one in written if "goal" not in one} == {
        "The truth", *(way.heading for way in WAYS), "Why verdicts are withheld",
    }  # fmt: skip
    assert len(json.loads((tmp_path / "verdicts-logs.json").read_text())["rows"]) == len(WAYS) * 2 * 2
    assert "| 1,200 | 100 | exchanged | click |" in (tmp_path / "verdicts.md").read_text()
