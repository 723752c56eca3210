"""The retraining command: a second driver, the status, a rollback, and the dates of a backfill."""

from datetime import date
from pathlib import Path

import pytest
import yaml

from sidestack.infra.errors import ConfigError
from sidestack.pipelines.execution import run_dir
from sidestack.pipelines.retrain.__main__ import backfill_dates, main
from sidestack.pipelines.run import run_lock
from tests.pipelines.retrain.nights import config_in


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "night.yaml"
    path.write_text(yaml.safe_dump({"run": {"name": "nights", "runs_dir": str(tmp_path / "runs")}}))
    return path


def test_second_driver_exits_with_a_message(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_lock(run_dir(config_in(tmp_path).run)):
        main(["--config", str(file)])
    assert "another driver is running here; this call leaves" in capsys.readouterr().err


def test_status_of_a_run_without_a_cycle_writes_nothing(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--config", str(file), "status"])
    assert capsys.readouterr().out == "no cycle yet\n"
    assert not (tmp_path / "runs").exists(), "status writes nothing"


def test_a_roll_back_without_a_champion_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file), "rollback"])
    assert "there is no champion before this one" in capsys.readouterr().err


def test_cycles_of_a_backfill_end_after_each_step() -> None:
    found = [*backfill_dates(date(2024, 1, 1), date(2024, 1, 8), 3)]
    assert found == [date(2024, 1, 2), date(2024, 1, 5), date(2024, 1, 8)]
    with pytest.raises(ConfigError, match="--to 2024-01-01: is before --from 2024-01-02"):
        list(backfill_dates(date(2024, 1, 2), date(2024, 1, 1), 1))


@pytest.mark.parametrize("arguments", [["--from", "2024-01-01"], ["--to", "2024-01-01"]])
def test_backfill_without_both_from_and_to_is_refused(
    arguments: list[str], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file), *arguments])
    assert "--from and --to: go together" in capsys.readouterr().err
