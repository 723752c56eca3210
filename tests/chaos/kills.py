"""Kill a pipeline at random moments, run it again, and hold its end against a run that nothing disturbed."""

import random
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.chaos.processes import kill, processes_of, wait_for_none
from tests.chaos.small_run import SmallRun

TARGETS = ("rank", "torchrun", "driver", "everything")
ORPHANS_LIMIT_S = 30.0
END_LIMIT_S = 600.0
_STARTS = re.compile(r"^\[([\w-]+)\] starts with", re.MULTILINE)
_RESUMES = re.compile(r"^\[([\w-]+)\] \w+: (?:goes on|resumes) from the checkpoint at step (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Kill:
    """One kill, and how the run came back.

    Attributes:
        target: what was killed, of `TARGETS`.
        after_s: seconds after the driver's start, or after the kill before where the driver went on.
        stage: the label of the stage that was launched last; empty: none was.
        ended_s: seconds until no process of the run was left; None where the driver or its job lived on.
        step: the last step that the stage had logged; None: it logs no steps, or had not begun.
        resumed_at: the step at which it went on later; None: it began anew, or had ended.
    """

    target: str
    after_s: float
    stage: str
    ended_s: float | None = None
    step: int | None = None
    resumed_at: int | None = None

    @property
    def steps_lost(self) -> int | None:
        """Steps that were made twice; None where no step had been logged, or the job lived on."""
        return None if self.step is None or self.target == "driver" else self.step - (self.resumed_at or 0)


@dataclass(frozen=True)
class Outcome:
    """What a run that was killed came to.

    Attributes:
        kills: those that hit it, in order.
        differences: outputs that differ from the undisturbed run's.
        open_runs: names of tracking runs left RUNNING.
        orphans: processes that lived on for `ORPHANS_LIMIT_S` after the run's end, or after a kill that ends it.
        refused: what a driver said that failed though nothing had been killed in its time; empty: none did.
        seconds: of the last driver, the one that ended well.
    """

    kills: tuple[Kill, ...]
    differences: tuple[str, ...]
    open_runs: tuple[str, ...]
    orphans: int
    refused: str
    seconds: float

    @property
    def survived(self) -> bool:
        """Whether nothing tells this run from one that was left alone."""
        return not (self.differences or self.open_runs or self.orphans or self.refused)


def undisturbed(run: SmallRun) -> tuple[dict[str, Any], float]:
    """Let a run end, and return what it came to and the seconds that it took.

    Raises:
        AssertionError: it failed.
    """
    began = time.monotonic()
    status = run.start().wait(timeout=END_LIMIT_S)
    assert status == 0, run.said()
    return run.result(), time.monotonic() - began


def kill_and_rerun(
    run: SmallRun, expected: Mapping[str, Any], num_kills: int, longest_s: float, rng: random.Random
) -> Outcome:
    """Kill parts of a run so many times, start it again as often as it takes, and return what came of it.

    A run may end before it was killed so many times.

    Args:
        run: a run of which nothing exists.
        expected: what an undisturbed run comes to.
        num_kills: how many kills. longest_s: the most seconds before the next. rng: of targets and moments.
    """
    kills, refused, orphans = list[Kill](), "", 0
    driver, began, is_hit = run.start(), time.monotonic(), False
    while True:
        patience = rng.uniform(0.2, longest_s) if len(kills) < num_kills else END_LIMIT_S
        status = _status(driver, patience)
        if status is None and len(kills) < num_kills:
            kills.append(_kill_one(run, patience, rng))
            is_hit = True
        elif status is not None and status != 0 and is_hit:
            if kills[-1].target != "driver":  # whose job lives on, for the next driver to find
                kills[-1], left = _ended(run, kills[-1])
                orphans += left
            driver, began, is_hit = run.start(), time.monotonic(), False
        else:
            refused = "" if status == 0 else _refusal(run, status)
            break
    seconds = time.monotonic() - began
    _, left = _ended(run, None)
    found = run.result()
    differing = (label for label in found.keys() | expected.keys() if found.get(label) != expected.get(label))
    told = _with_resumes(kills, run.said())
    return Outcome(told, tuple(sorted(differing)), tuple(run.open_runs()), orphans + left, refused, seconds)


def _status(driver: "subprocess.Popen[bytes]", patience_s: float) -> int | None:
    """Return a driver's exit status; None: it is under way after so many seconds."""
    try:
        return driver.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        return None


def _kill_one(run: SmallRun, after_s: float, rng: random.Random) -> Kill:
    """Kill a part of the run that is there at this moment."""
    found = processes_of(run.folder)
    kinds = {process.kind for process in found}
    target = rng.choice([one for one in TARGETS if one in kinds or one == "everything"])
    victims = [process for process in found if target in (process.kind, "everything")]
    if target == "rank":
        victims = [rng.choice(victims)]
    steps = run.steps_logged()
    kill(victims)
    started = _STARTS.findall(run.said())
    stage = started[-1] if started else ""
    return Kill(target, after_s, stage, step=steps.get(stage))


def _ended(run: SmallRun, last: Kill | None) -> tuple[Any, int]:
    """Wait until no process of a run is left; return the kill with its seconds, and how many were left."""
    seconds = wait_for_none(run.folder, ORPHANS_LIMIT_S)
    left = processes_of(run.folder) if seconds is None else []
    kill(left)
    return last and replace(last, ended_s=seconds), len(left)


def _refusal(run: SmallRun, status: int | None) -> str:
    """Return why a run does not go on though nothing was killed in this driver's time."""
    if status is None:
        kill(processes_of(run.folder))
        return f"did not end within {END_LIMIT_S:g} s"
    return (run.said().splitlines() or [f"status {status}, and no line"])[-1]


def _with_resumes(kills: Sequence[Kill], said: str) -> tuple[Kill, ...]:
    """Return the kills with the steps at which their stages went on, as the drivers' output tells them in turn."""
    resumes = [(label, int(step)) for label, step in _RESUMES.findall(said)]
    told = []
    for one in kills:
        at = next((place for place, (label, _) in enumerate(resumes) if label == one.stage), None)
        if one.step is not None and at is not None:
            one = replace(one, resumed_at=resumes[at][1])
            resumes = resumes[at + 1 :]
        told.append(one)
    return tuple(told)
