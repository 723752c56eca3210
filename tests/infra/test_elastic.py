"""torchrun restarts a killed rank, and the stage resumes from its last checkpoint."""

import shutil
from pathlib import Path

import pytest

from sidestack.infra.manifest import verify
from tests.infra.jobs import LIMIT_S, job
from tests.infra.test_preemption import STAGE, settings

RESTARTING = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""The environment that `components.torchrun` sets for jobs with restarts."""


def result_of_restarted_job(folder: Path, rank: int, step: int) -> str:
    """Run a stage under torchrun, kill a rank before a step, and return what the restarted stage committed."""
    out, log = folder / "out", folder / "job.log"
    changes = settings(out, fault="die", fault_rank=rank, fault_step=step)
    with job(STAGE, changes, log, environment=RESTARTING, torchrun=["--max-restarts", "1"]) as process:
        assert process.wait(LIMIT_S) == 0, log.read_text()
    assert verify(out).facts["resumed_from"] == step // 5 * 5
    found = (out / "sum.txt").read_text()
    shutil.rmtree(out)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    with job(STAGE, settings(folder / "out"), folder / "job.log", ranks=2) as process:
        assert process.wait(LIMIT_S) == 0
    return (folder / "out/sum.txt").read_text()


@pytest.mark.parametrize(("rank", "step"), [(0, 13), (1, 7)])
def test_killed_rank_is_restarted_and_the_result_is_the_same(
    tmp_path: Path, expected: str, rank: int, step: int
) -> None:
    assert result_of_restarted_job(tmp_path, rank, step) == expected
