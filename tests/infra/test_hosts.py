"""Hosts of one stage that differ in inputs, code or clock are found before work begins."""

import contextlib
import io
import os
import time

import pytest

from sidestack.infra.code import VARIABLE, code_environment
from sidestack.infra.distributed import ALONE, World
from sidestack.infra.hosts import require_alike_hosts
from tests.distributed import RankFailure, run_distributed


def require_same_inputs(world: World, inputs: tuple[str, ...]) -> None:
    require_alike_hosts(world, {"config": "c" * 64, "input dataset": inputs[world.rank] * 64})


def require_same_code(world: World, code: tuple[str, ...]) -> None:
    os.environ[VARIABLE] = code[world.rank]
    require_alike_hosts(world, {})


def output_with_clocks(world: World, ahead_s: tuple[float, ...]) -> str:
    real, output = time.time, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(output):
        patch.setattr("sidestack.infra.hosts.time.time", lambda: real() + ahead_s[world.rank])
        require_alike_hosts(world, {})
    return output.getvalue()


def test_alike_hosts_are_accepted() -> None:
    run_distributed(require_same_inputs, ("a", "a"))


def test_different_input_is_reported_on_every_rank_with_its_hosts() -> None:
    with pytest.raises(RankFailure) as caught:
        run_distributed(require_same_inputs, ("a", "b"))
    for error in caught.value.errors:
        assert "ConfigError: input dataset: rank 0 on " in error
        assert "sees aaaaaaaaaaaa; rank 1 on " in error and "bbbbbbbbbbbb" in error


def test_code_other_than_the_jobs_is_refused_on_every_rank() -> None:
    right = code_environment(["infra/code.py"])[VARIABLE]
    run_distributed(require_same_code, (right, right))
    with pytest.raises(RankFailure) as caught:
        run_distributed(require_same_code, (right, f"{'0' * 64}:infra/code.py"))
    first, second = caught.value.errors
    assert "StageError: checking the code: rank 1 failed: code " in first
    assert "is not the code that the job's key names, 000000000000" in second


def test_clock_difference_is_logged_by_rank_0_only() -> None:
    assert run_distributed(output_with_clocks, (0.0, 0.0)) == ["", ""]
    first, second = run_distributed(output_with_clocks, (0.0, 3600.0))
    assert first.startswith("warning: the clock of rank 1 on ") and " 3600 s ahead " in first
    assert second == ""


def test_single_rank_checks_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    require_alike_hosts(ALONE, {"config": "c"})
    monkeypatch.setenv(VARIABLE, f"{'0' * 64}:infra/code.py")
    with pytest.raises(ValueError, match="is not the code that the job's key names"):
        require_alike_hosts(ALONE, {"config": "c"})
