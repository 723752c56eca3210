"""One run per policy: cycles of `pipelines.retrain` over a log that grows by one period at a time."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sidestack.benchmarks.forked_launcher import CPU_FILE, ForkedLauncher
from sidestack.benchmarks.record import Row
from sidestack.benchmarks.replay.log import Sample, growing_log
from sidestack.infra.code import code_digest
from sidestack.infra.config import digest, parse, plain
from sidestack.infra.errors import ConfigError, StageError
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.execution import Pipeline, run_dir
from sidestack.pipelines.graph import prepare_stage
from sidestack.pipelines.retrain.config import PolicyName
from sidestack.pipelines.retrain.cycle import Retraining
from sidestack.pipelines.retrain.decide import dates_judged
from sidestack.pipelines.retrain.ledger import Cycle, Ledger, Outcome
from sidestack.pipelines.retrain.registry import Registry

FIRST = "first"
"""The run of the first cycle, which all policies share."""
EVERY: dict[PolicyName, int] = {"rebuild": 4}
"""Policy -> n: every n-th cycle uses the policy, the others append; for policies not listed, every cycle uses it."""
FIGURES = (
    "candidate_", "champion_", "click_gain", "conversion_gain", "sid_changed_share", "new_item_share",
    "reconstruction_ratio",
)  # fmt: skip
"""Prefixes of the names of a cycle's figures that a replay's rows keep; all figures are in its ledger."""
CODE = ("infra", "encoder", "ranker", "components", "pipelines", "benchmarks/forked_launcher.py")


@dataclass(frozen=True)
class Span:
    """How much of a log is replayed, in periods of `retrain.every_days`.

    Attributes:
        users: share of the log's users. learned: periods that the first champion learns.
        cycles: maximum number of cycles after it; None: all that the log has.
    """

    users: float
    learned: int
    cycles: int | None = None

    def as_ofs(self, dates: Sequence[date], days: int) -> list[date]:
        """Return the ends of the cycles, including the first champion's.

        Args:
            dates: the log's, in order. days: of a period.

        Raises:
            ConfigError: the log is too short for a cycle after the first.
        """
        periods = ((dates[-1] - dates[0]).days + 1) // days
        first = self.learned + 1  # one more than learned, for judging
        last = periods if self.cycles is None else min(periods, first + self.cycles)
        if last <= first:
            raise ConfigError(f"replay: the log has {periods} periods of {days} days; must have more than {first}")
        return [dates[0] + timedelta(days=days * number) for number in range(first, last + 1)]


class NoRegistry(Registry):
    """A tracking store that logs nothing: a replay's record is its ledger."""

    def __init__(self) -> None:
        """Do not connect to a store."""

    def foreign_change(self, ledger: Ledger) -> str:
        """Return an empty text: the store was not edited."""
        return ""

    def publish(self, ledger: Ledger, config: Mapping[str, Any], force: bool = False) -> None:
        """Log nothing."""


class LocalRetraining(Retraining):
    """Retraining without a tracking store."""

    @cached_property
    def registry(self) -> Registry:
        """The store that logs nothing."""
        return NoRegistry()


def raw_dataset(config: PipelineConfig, cache: Path) -> Dataset:
    """Return the dataset of the configured source, prepared once below `cache`."""
    launcher = ForkedLauncher()
    try:
        run = config.run.model_copy(update={"name": "raw", "runs_dir": cache})
        pipeline = Pipeline(run, launcher)
        stage = prepare_stage(config)
        pipeline.run_stages([stage])
        return read_dataset(pipeline.done[stage.label])
    finally:
        launcher.close()


class ReplayInput(NamedTuple):
    """A sampled log to replay.

    Attributes:
        config: of all runs, over the sampled log. as_ofs: ends of the cycles. origin: source of the log.
    """

    config: PipelineConfig
    as_ofs: list[date]
    origin: str


def prepare_replay(config: PipelineConfig, span: Span, cache: Path, runs: Path) -> ReplayInput:
    """Sample the log, and return what to replay.

    Args:
        config: the log's source, and the models' settings. span: how much of the log.
        cache: folder of the log. runs: folder of the runs, with one subfolder for the same log, settings and code.
    """
    dataset = raw_dataset(config, cache)
    days = config.retrain.every_days
    log = growing_log(dataset, cache, Sample(span.users, days))
    source = {"kind": "tables", "path": str(log), "requests": "request_id", "test_days": days}
    values = plain(config) | {"prepare": {"source": source, "cache_dir": str(cache)}}
    one = parse(PipelineConfig, values, "replay")
    folder = runs / digest({"config": values, "code": code_digest(CODE)})[:12]
    run = one.run.model_copy(update={"runs_dir": folder})
    replayed = one.model_copy(update={"run": run})
    return ReplayInput(replayed, span.as_ofs(dataset.dates(), days), dataset.spec.origin)


def with_policy(config: PipelineConfig, policy: PolicyName) -> PipelineConfig:
    """Return a configuration whose encoders follow a policy, in a run with the policy's name."""
    changes = {"policy": policy, "every": EVERY.get(policy, 1)}
    encoder = config.retrain.encoder.model_copy(update=changes)
    retrain = config.retrain.model_copy(update={"encoder": encoder})
    return config.model_copy(update={"retrain": retrain, "run": config.run.model_copy(update={"name": policy})})


def first_champion(config: PipelineConfig, as_of: date) -> None:
    """Train the first champion, unless there is one.

    Raises:
        StageError: the candidate was not promoted.
    """
    one = config.model_copy(update={"run": config.run.model_copy(update={"name": FIRST})})
    ledger = _run_cycles(one, [as_of])
    if ledger.champion is None:
        outcome = ledger.cycles[0].outcome
        gates = outcome.gates if outcome is not None else ()
        closed = [f"{gate.name}: {gate.why or gate.rule}" for gate in gates if gate.verdict != "open"]
        raise StageError(f"{run_dir(one.run)}: the first ranker was not promoted: {'; '.join(closed)}")


def replay(config: PipelineConfig, policy: PolicyName, as_ofs: Sequence[date]) -> list[Row]:
    """Run all cycles of a policy after the first champion's, except those run before.

    Args:
        config: of all runs. policy: of this run. as_ofs: ends of the cycles; the first is `first_champion`'s.

    Returns:
        one row per cycle.
    """
    one = with_policy(config, policy)
    folder = run_dir(one.run)
    if not folder.exists():
        copy = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder.with_name(FIRST), copy)
        copy.rename(folder)
    return list(_rows(_run_cycles(one, as_ofs), policy))


def _run_cycles(config: PipelineConfig, as_ofs: Sequence[date]) -> Ledger:
    launcher = ForkedLauncher()
    try:
        retraining = LocalRetraining(config, launcher)
        ledger = retraining.ledger
        if ledger.under_way is not None:
            retraining.step()
        over = [cycle.plan.as_of for cycle in ledger.cycles]
        for as_of in as_ofs:
            if as_of not in over:
                retraining.step(as_of)
        return ledger
    finally:
        launcher.close()


def _rows(ledger: Ledger, policy: PolicyName) -> Iterator[Row]:
    for before, cycle in zip([None, *ledger.cycles], ledger.cycles, strict=False):
        plan, outcome = cycle.plan, cycle.outcome
        assert outcome is not None and plan.newest is not None
        dataset = read_dataset(ledger.run / plan.prepared)
        seen = date.min if before is None or before.plan.newest is None else before.plan.newest
        by_date = {entry.date: entry.rows for entry in dataset.partitions("events")}
        learned = dates_judged(plan.learned) if outcome.candidate is not None else ()
        yield {
            "policy": policy,
            "cycle": plan.number,
            "as_of": str(plan.as_of),
            "newest": str(plan.newest),
            "rows_new": sum(rows for day, rows in by_date.items() if day > seen),
            "rows_learned": sum(rows for day, rows in by_date.items() for low, high in learned if low <= day <= high),
            "rows_log": sum(by_date.values()),
            "items": dataset.spec.num_items,
            "promoted": outcome.promoted,
            "closed": [gate.name for gate in outcome.gates if gate.verdict != "open"],
            "cpu_seconds": cpu_seconds(ledger.run, cycle, outcome),
            "wall_seconds": outcome.seconds,
            "figures": {name: value for name, value in outcome.figures.items() if name.startswith(FIGURES)},
        }


def cpu_seconds(run: Path, cycle: Cycle, outcome: Outcome) -> dict[str, float]:
    """Return the CPU seconds of a cycle's stages, including `prepare`, by label."""
    made = {"prepare": cycle.plan.prepared, **outcome.stages}
    files = {label: (run / path).with_name(f"{path.name}.logs") / CPU_FILE for label, path in made.items()}
    return {label: float(file.read_text(encoding="utf-8")) for label, file in files.items()}


def run_bytes(config: PipelineConfig, policy: PolicyName) -> int:
    """Return the bytes of a policy's run."""
    folder = run_dir(with_policy(config, policy).run)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
