"""The ledger of cycles refuses paths outside the run's folder."""

from pathlib import Path

import pytest

from sidestack.infra.errors import ConfigError
from sidestack.pipelines.retrain.ledger import CYCLES, PLAN_FILE, Ledger


def write_plan(run: Path, prepared: str) -> None:
    folder = run / CYCLES / "0001"
    folder.mkdir(parents=True, exist_ok=True)
    plan = f'{{"number": 1, "at": "2026-01-01T00:00:00", "why": "made up", "prepared": "{prepared}"}}'
    (folder / PLAN_FILE).write_text(plan)


@pytest.mark.parametrize("path", ["../other", "/shared/other", "prepare/../../other"])
def test_path_outside_the_runs_folder_is_refused(path: str, tmp_path: Path) -> None:
    write_plan(tmp_path, "prepare/0123456789ab")
    assert Ledger(tmp_path).cycles[0].plan.prepared == Path("prepare/0123456789ab")
    write_plan(tmp_path, path)
    with pytest.raises(ConfigError, match=r"plan\.json\.prepared: must be a path below the run's folder"):
        Ledger(tmp_path)
