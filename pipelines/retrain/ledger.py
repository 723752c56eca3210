"""The record of cycles, on disk beside the run: plans, outcomes, and thereby which version is champion.

    <run>/cycles/0007/plan.json      written before anything of the cycle is launched
    <run>/cycles/0007/outcome.json   written last: the cycle is over

Both files are written atomically and contain their own digest; an outcome also contains its plan's. A cycle with a plan
and no outcome is running or has failed: the next call resumes it with the same plan. A roll-back is a cycle without a
candidate. The tracking store is updated from this record and is never read as a source of truth.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from sidestack.infra.config import C, Config, digest, is_inside, parse
from sidestack.infra.errors import CommitError, DataError, StageError
from sidestack.infra.files import write_whole
from sidestack.infra.manifest import verify
from sidestack.infra.remote.copies import refresh, write_if_absent
from sidestack.infra.remote.urls import address
from sidestack.infra.sealed import seal, unseal
from sidestack.pipelines.retrain.config import PolicyName
from sidestack.ranker.config import Dates

CYCLES = "cycles"
PLAN_FILE, OUTCOME_FILE = "plan.json", "outcome.json"

Verdict = Literal["open", "closed", "no verdict"]


def _require_inside(path: Path) -> Path:
    if not is_inside(path):
        raise ValueError("must be a path below the run's folder")
    return path


PathInside = Annotated[Path, AfterValidator(_require_inside)]
"""A path relative to the run's folder."""


class Gate(Config):
    """One condition for a promotion.

    `no verdict` means too little data to judge; it blocks a candidate as `closed` does.
    """

    name: str
    verdict: Verdict
    figure: float | None = None
    rule: str
    """What the figure must be, in words."""
    why: str = ""


class Version(Config):
    """A ranker with its SIDs and encoders, promoted and rolled back as one. Paths are relative to the run's folder."""

    number: int
    """Number of the cycle that made it."""
    ranker: PathInside
    export: PathInside
    dataset: PathInside
    """The snapshot with its SIDs."""
    encoders: dict[str, PathInside]
    learned_to: dict[str, date]
    """By task, the last date whose labels it has learned."""


class Plan(Config):
    """Plan of a cycle, decided once."""

    number: int
    kind: Literal["train", "rollback"] = "train"
    at: datetime
    """When it was decided."""
    why: str
    champion: int | None = None
    """The version that the cycle starts from, or that a roll-back returns to."""
    as_of: date | None = None
    prepared: PathInside = Path()
    """The snapshot that `prepare` committed, relative to the run's folder."""
    newest: date | None = None
    """The snapshot's last date with rows."""
    policy: PolicyName = "append"
    """Policy of this cycle."""
    learned: dict[str, Dates] = {}
    measured: dict[str, Dates] = {}
    all_dates: dict[str, Dates] = {}
    """By task, all dates before the judged ones: the training dates of a ranker from scratch."""
    revised: tuple[date, ...] = ()
    """Dates that were learned before and whose rows have changed; they are not learned again."""


class Outcome(Config):
    """Outcome of a cycle."""

    at: datetime
    plan: str = ""
    """The digest of the cycle's plan."""
    candidate: Version | None = None
    promoted: bool = False
    gates: tuple[Gate, ...] = ()
    figures: dict[str, float] = {}
    """Metrics and drift, by name."""
    seconds: dict[str, float] = {}
    """Duration by stage, without stages that were committed before."""
    stages: dict[str, PathInside] = {}
    """By label, the output of each stage, relative to the run's folder."""


@dataclass(frozen=True)
class Cycle:
    """A plan and its outcome; the outcome is None while the cycle is running."""

    plan: Plan
    outcome: Outcome | None


class Ledger:
    """The cycles of a run.

    Args of the constructor:
        run: the run's folder.

    Attributes:
        cycles: all of them, in order.

    Raises:
        CommitError, DataError, ConfigError: a file was altered or is invalid.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        folder = run / CYCLES
        refresh(folder)
        names = (PLAN_FILE, OUTCOME_FILE)
        found = sorted(path for path in folder.glob("[0-9]*") if any((path / name).exists() for name in names))
        self.cycles = [_read(path) for path in found]
        for number, cycle in enumerate(self.cycles, 1):
            if cycle.plan.number != number:
                raise DataError(f"{folder}: cycle {number} is missing: the record was altered")
            if cycle.outcome is None and number < len(self.cycles):
                raise DataError(f"{folder / f'{number:04d}'}: has no {OUTCOME_FILE}, and cycle {number + 1} began")

    @property
    def under_way(self) -> Plan | None:
        """The plan of the cycle without an outcome."""
        last = self.cycles[-1] if self.cycles else None
        return last.plan if last is not None and last.outcome is None else None

    @property
    def versions(self) -> Mapping[int, Version]:
        """All candidates that were made, by number."""
        made = [cycle.outcome.candidate for cycle in self.cycles if cycle.outcome is not None]
        return {version.number: version for version in made if version is not None}

    @property
    def champions(self) -> list[int]:
        """The versions that were promoted and not rolled back, in order; the last is champion."""
        found: list[int] = []
        for plan, outcome in ((cycle.plan, cycle.outcome) for cycle in self.cycles):
            if outcome is None:
                continue
            if plan.kind == "rollback":
                assert plan.champion is not None
                found = found[: found.index(plan.champion) + 1] if plan.champion in found else [*found, plan.champion]
            elif outcome.promoted:
                found.append(plan.number)
        return found

    @property
    def champion(self) -> Version | None:
        """The serving version; None if none was promoted yet."""
        return self.versions[self.champions[-1]] if self.champions else None

    @property
    def ended(self) -> list[Cycle]:
        """The completed cycles, without roll-backs and abandoned cycles, which trained nothing."""
        return [one for one in self.cycles if one.outcome is not None and one.outcome.stages]

    @property
    def trained(self) -> Cycle | None:
        """The last completed cycle."""
        return self.ended[-1] if self.ended else None

    def open(self, plan: Plan) -> None:
        """Record a plan, which begins the cycle.

        Raises:
            StageError: at a URL, where there is no lock across machines, another call recorded a plan meanwhile.
        """
        assert plan.number == len(self.cycles) + 1 and self.under_way is None
        file = self._file(plan, PLAN_FILE)
        if not write_if_absent(file, seal(plan)):
            raise StageError(f"{address(file)}: another machine began this cycle; the next call resumes it")
        self._write(plan, PLAN_FILE, plan)
        self.cycles.append(Cycle(plan, None))

    def close(self, outcome: Outcome) -> Cycle:
        """Record the outcome of the running cycle."""
        plan = self.under_way
        assert plan is not None
        outcome = outcome.model_copy(update={"plan": digest(plan)})
        self._write(plan, OUTCOME_FILE, outcome)
        self.cycles[-1] = Cycle(plan, outcome)
        return self.cycles[-1]

    def require_whole(self, version: Version, check: Callable[[Path], object] = verify) -> None:
        """Check that all parts of a version exist and are intact.

        Args:
            version: the version. check: checks a directory; by default every byte.

        Raises:
            StageError: a part is missing or was altered; the message says how to recover.
        """
        for path in (version.ranker, version.export, version.dataset, *version.encoders.values()):
            try:
                check(self.run / path)
            except CommitError as error:
                others = [f"{number}" for number in reversed(self.champions) if number != version.number]
                back = f", or go back: retrain rollback --version {others[0]}" if others else ""
                raise StageError(
                    f"champion {version.number} is not whole: {error}; restore {self.run / path}{back}"
                ) from error

    def _write(self, plan: Plan, name: str, content: Config) -> None:
        write_whole(self._file(plan, name), seal(content))

    def _file(self, plan: Plan, name: str) -> Path:
        return self.run / CYCLES / f"{plan.number:04d}" / name


def _read(folder: Path) -> Cycle:
    plan = _parsed(Plan, folder / PLAN_FILE)
    file = folder / OUTCOME_FILE
    outcome = _parsed(Outcome, file) if file.exists() else None
    if outcome is not None and outcome.plan not in (digest(plan), ""):  # earlier releases wrote none
        raise DataError(f"{file}: came of another plan than {PLAN_FILE} beside it: one of them was replaced")
    return Cycle(plan, outcome)


def _parsed(model: type[C], file: Path) -> C:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    values, _ = unseal(content, file)
    return parse(model, values, str(file))
