"""A trace of a loop's steps: the requested number, also if the loop ends early, and no file if there is no step."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from sidestack.infra.profile import WARMUP_STEPS, StepProfile


def steps_in(file: Path) -> set[str]:
    """Return the names of the steps in a trace."""
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}


def loop(profile: StepProfile, steps: int) -> None:
    for _ in range(steps):
        torch.ones(8, 8).mm(torch.ones(8, 8))
        profile.step()
    profile.close()


@pytest.mark.parametrize("taken", [WARMUP_STEPS + 9, WARMUP_STEPS + 3])
def test_trace_has_the_steps_after_the_warm_up(tmp_path: Path, taken: int) -> None:
    lines: list[str] = []
    loop(StepProfile(3, tmp_path / "profile", rank=1, log=lines.append), taken)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "rank-00001.json.gz"
    assert steps_in(file) == {"ProfilerStep#1", "ProfilerStep#2", "ProfilerStep#3"}
    (text,) = lines
    assert text.startswith("profile of 3 steps") and " 1.0 calls  aten::mm\n" in text and text.endswith(str(file))


def test_steps_of_a_loop_that_ends_early_are_traced(tmp_path: Path) -> None:
    lines: list[str] = []
    loop(StepProfile(9, tmp_path, log=lines.append), WARMUP_STEPS + 2)
    assert {"ProfilerStep#1", "ProfilerStep#2"} <= steps_in(tmp_path / "rank-00000.json.gz")
    assert lines[0].startswith("profile of 2 steps")


@pytest.mark.parametrize(
    ("requested", "taken"), [(0, 20), (3, WARMUP_STEPS - 2), (3, WARMUP_STEPS - 1), (3, WARMUP_STEPS)]
)
def test_no_trace_is_written_without_steps_to_trace_and_the_reason_is_logged(
    tmp_path: Path, requested: int, taken: int
) -> None:
    lines: list[str] = []
    loop(StepProfile(requested, tmp_path / "profile", log=lines.append), taken)
    assert lines == [f"profile: nothing to trace: {taken} steps; the first 5 are left out"][: min(requested, 1)]
    assert not (tmp_path / "profile").exists()
