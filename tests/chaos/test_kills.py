"""A pipeline whose ranks, torchrun and driver are killed at random moments has the result of an undisturbed run.

`record_property` writes the figures of the kills into the JUnit report, which `benchmarks.reliability` reads.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.kills import Outcome, kill_and_rerun, undisturbed
from tests.chaos.small_run import SmallRun

pytestmark = pytest.mark.whole
KILLS_PER_RUN = 6
KILLS_IN_CI = 3
"""Three more hit retraining (tests/pipelines/retrain/test_kills.py)."""
Expected = tuple[dict[str, Any], float]
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Expected]:
    """Return the result of an undisturbed run and its duration in seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    yield undisturbed(SmallRun(folder))
    shutil.rmtree(folder)


def run_with_kills(folder: Path, expected: Expected, seed: int, num_kills: int = KILLS_PER_RUN) -> Outcome:
    result, seconds = expected
    return kill_and_rerun(SmallRun(folder), result, num_kills, seconds / 3, random.Random(seed))


def require_survived(outcome: Outcome) -> None:
    assert not outcome.refused, "a driver failed although nothing was killed while it ran"
    assert outcome.differences == (), "these outputs differ from those of an undisturbed run"
    assert outcome.open_runs == (), "tracking runs were left RUNNING"
    assert outcome.orphans == 0


def test_run_with_three_kills_equals_an_undisturbed_run(expected: Expected, tmp_path: Path) -> None:
    seed = time.time_ns()
    outcome = run_with_kills(tmp_path, expected, seed, KILLS_IN_CI)
    print(f"seed {seed}: {outcome.kills}")
    require_survived(outcome)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(9))
def test_run_with_kills_equals_an_undisturbed_run(
    expected: Expected, tmp_path: Path, seed: int, record_property: Record
) -> None:
    began = time.monotonic()
    outcome = run_with_kills(tmp_path, expected, seed)
    lost = [one.steps_lost for one in outcome.kills if one.steps_lost is not None]
    record_property("fault", "SIGKILL to a rank, torchrun, the driver, or all of them, while a pipeline runs")
    record_property("faults", len(outcome.kills))
    record_property("measure", "seconds that a kill costs, the new start included")
    record_property("seconds", (time.monotonic() - began - expected[1]) / len(outcome.kills))
    record_property("steps_lost", max(lost, default=0))
    require_survived(outcome)
