"""Kill a pipeline at random moments, run it again, and compare its result with that of an undisturbed run."""

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
_RESUMES = re.compile(r"^\[([\w-]+)\] \w+: resumes from the checkpoint at step (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Kill:
    """One kill, and how the run resumed.

    Attributes:
        target: what was killed, one of `TARGETS`.
        after_s: seconds after the driver's start, or after the previous kill if the driver continued.
        stage: the label of the stage that was launched last; empty if none was.
        ended_s: seconds until no process of the run was left; None if the driver or its job continued.
        step: the last step that the stage had logged; None if it logs no steps or had not begun.
        resumed_at: the step from which the stage resumed; None if it started again from its beginning or had ended.
    """

    target: str
    after_s: float
    stage: str
    ended_s: float | None = None
    step: int | None = None
    resumed_at: int | None = None

    @property
    def steps_lost(self) -> int | None:
        """Steps that were repeated; None if no step had been logged or the job continued."""
        return None if self.step is None or self.target == "driver" else self.step - (self.resumed_at or 0)


@dataclass(frozen=True)
class Outcome:
    """The result of a run that was killed.

    Attributes:
        kills: the kills, in order.
        differences: outputs that differ from the undisturbed run's.
        open_runs: names of tracking runs left RUNNING.
        orphans: processes still alive `ORPHANS_LIMIT_S` after the run's end, or after a kill that ends it.
        refused: the last line of a driver that failed although nothing was killed while it ran; empty if none did.
        seconds: the duration of the last driver.
    """

    kills: tuple[Kill, ...]
    differences: tuple[str, ...]
    open_runs: tuple[str, ...]
    orphans: int
    refused: str
    seconds: float

    @property
    def survived(self) -> bool:
        """Whether this run does not differ from an undisturbed one."""
        return not (self.differences or self.open_runs or self.orphans or self.refused)


def undisturbed(run: SmallRun) -> tuple[dict[str, Any], float]:
    """Run a pipeline without kills; return its result and its duration in seconds.

    Raises:
        AssertionError: the run failed.
    """
    began = time.monotonic()
    status = run.start().wait(timeout=END_LIMIT_S)
    assert status == 0, run.printed()
    return run.result(), time.monotonic() - began


def kill_and_rerun(
    run: SmallRun, expected: Mapping[str, Any], num_kills: int, longest_s: float, rng: random.Random
) -> Outcome:
    """Kill parts of a run `num_kills` times, restart it until it ends, and return the outcome.

    A run may end before the last kill.

    Args:
        run: a run whose folder does not exist yet.
        expected: the result of an undisturbed run.
        num_kills: the number of kills.
        longest_s: the longest time before the next kill.
        rng: draws targets and moments.
    """
    kills, refused, orphans = list[Kill](), "", 0
    driver, began, was_killed = run.start(), time.monotonic(), False
    while True:
        patience = rng.uniform(0.2, longest_s) if len(kills) < num_kills else END_LIMIT_S
        status = _status(driver, patience)
        if status is None and len(kills) < num_kills:
            kills.append(_kill_one(run, patience, rng))
            was_killed = True
        elif status is not None and status != 0 and was_killed:
            if kills[-1].target != "driver":  # the driver's job continues, and the next driver finds it
                kills[-1], left = _ended(run, kills[-1])
                orphans += left
            driver, began, was_killed = run.start(), time.monotonic(), False
        else:
            refused = "" if status == 0 else _refusal(run, status)
            break
    seconds = time.monotonic() - began
    _, left = _ended(run, None)
    found = run.result()
    differing = (label for label in found.keys() | expected.keys() if found.get(label) != expected.get(label))
    complete = _with_resumes(kills, run.printed())
    return Outcome(complete, tuple(sorted(differing)), tuple(run.open_runs()), orphans + left, refused, seconds)


def _status(driver: "subprocess.Popen[bytes]", patience_s: float) -> int | None:
    """Return a driver's exit status, or None if it still runs after `patience_s`."""
    try:
        return driver.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        return None


def _kill_one(run: SmallRun, after_s: float, rng: random.Random) -> Kill:
    """Kill a randomly drawn part of the run among those that are running."""
    found = processes_of(run.folder)
    kinds = {process.kind for process in found}
    target = rng.choice([one for one in TARGETS if one in kinds or one == "everything"])
    victims = [process for process in found if target in (process.kind, "everything")]
    if target == "rank":
        victims = [rng.choice(victims)]
    steps = run.steps_logged()
    kill(victims)
    started = _STARTS.findall(run.printed())
    stage = started[-1] if started else ""
    return Kill(target, after_s, stage, step=steps.get(stage))


def _ended(run: SmallRun, last: Kill | None) -> tuple[Any, int]:
    """Wait until no process of a run is left; return the kill with `ended_s`, and the number of orphans."""
    seconds = wait_for_none(run.folder, ORPHANS_LIMIT_S)
    left = processes_of(run.folder) if seconds is None else []
    kill(left)
    return last and replace(last, ended_s=seconds), len(left)


def _refusal(run: SmallRun, status: int | None) -> str:
    """Return why a run does not continue although nothing was killed while its driver ran."""
    if status is None:
        kill(processes_of(run.folder))
        return f"did not end within {END_LIMIT_S:g} s"
    return (run.printed().splitlines() or [f"status {status}, and no line"])[-1]


def _with_resumes(kills: Sequence[Kill], printed: str) -> tuple[Kill, ...]:
    """Return the kills with the steps from which their stages resumed, which the drivers' output names in order."""
    resumes = [(label, int(step)) for label, step in _RESUMES.findall(printed)]
    complete = []
    for one in kills:
        at = next((place for place, (label, _) in enumerate(resumes) if label == one.stage), None)
        if one.step is not None and at is not None:
            one = replace(one, resumed_at=resumes[at][1])
            resumes = resumes[at + 1 :]
        complete.append(one)
    return tuple(complete)
