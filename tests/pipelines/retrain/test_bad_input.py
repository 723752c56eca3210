"""Half-written, empty, late or revised dates are reported, and no row is learned twice."""

from datetime import date, timedelta
from pathlib import Path

import pytest

from sidestack.infra.errors import DataError
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.execution import run_dir
from sidestack.pipelines.retrain.ledger import Cycle, Ledger
from tests.pipelines.own_log import FIRST, OwnLog
from tests.pipelines.retrain.nights import config_in, retraining

pytestmark = pytest.mark.whole


def day(n: int) -> date:
    return FIRST + timedelta(days=n)


def call(config: PipelineConfig) -> Cycle | None:
    with retraining(config) as one:
        return one.step()


def learned(config: PipelineConfig) -> list[date]:
    """Return the dates whose clicks the cycles have learned, cycle by cycle."""
    plans = [cycle.plan for cycle in Ledger(run_dir(config.run)).cycles]
    spans = [plan.learned["click"] for plan in plans]
    return [first + timedelta(days=n) for first, last in spans for n in range((last - first).days + 1)]


def test_half_written_empty_and_revised_dates_are_reported_and_not_learned_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(URI_VARIABLE, "http://localhost:1")  # tracking is not tested here
    log = OwnLog(tmp_path / "log", days=6, items=200, events_per_day=800)
    source = {"kind": "tables", "path": str(log.path), "followup_days": {"conversion": 2}}
    config = config_in(tmp_path, source)
    first = call(config)
    assert first is not None and first.outcome is not None and first.outcome.promoted

    file = log.file(log.add_day())
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"date={day(6)}.*does not end in a footer"):
        call(config)
    assert Ledger(run_dir(config.run)).under_way is None
    file.write_bytes(content)
    log.add_items(20)
    second = call(config)
    assert second is not None and second.plan.newest == day(6)
    assert call(config) is None, "the same dates twice are one cycle"

    log.add_empty_day()
    assert call(config) is None, "an empty date is no new date"
    log.revise(day(2))
    log.add_day()
    capsys.readouterr()
    third = call(config)
    assert third is not None and third.plan.revised == (day(2),)
    assert "1 dates that were learned have other rows now: 2024-01-03; not learned again" in capsys.readouterr().err
    assert third.plan.newest == day(8)
    found = learned(config)
    assert found == [day(n) for n in range(7)], "each date is learned once, except the one that is judged"
