"""One cycle of retraining, from new data to the verdict; see `pipelines.retrain.ledger` for the record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path

from sidestack.infra.config import plain
from sidestack.infra.manifest import fetched, read_manifest, verify
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.tables import read_json
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.environment import without_values
from sidestack.pipelines.execution import Launches, Pipeline, run_dir
from sidestack.pipelines.graph import Stage, encoder_stage, prepare_stage
from sidestack.pipelines.job_log import log_line
from sidestack.pipelines.retrain.decide import (
    Windows,
    dates_before,
    dates_with_rows,
    end_of,
    is_due,
    learned_to,
    policy_of,
    revised_dates,
    windows_of,
)
from sidestack.pipelines.retrain.gates import may_promote
from sidestack.pipelines.retrain.judge import JUDGEMENT_FILE
from sidestack.pipelines.retrain.ledger import Cycle, Gate, Ledger, Outcome, Plan, Version
from sidestack.pipelines.retrain.registry import Registry
from sidestack.pipelines.retrain.retention import delete_expired
from sidestack.pipelines.retrain.stages import BEFORE, CHAMPION, PREPARED, champion_encoder, cycle_stages


@dataclass
class Retraining:
    """The cycles of a run.

    Attributes:
        config: the run's. launcher: starts its stages.
    """

    config: PipelineConfig
    launcher: Launches
    _preparing: dict[str, float] = field(default_factory=dict, init=False)  # seconds, by stage

    @property
    def run(self) -> Path:
        """The run's folder."""
        return run_dir(self.config.run)

    @cached_property
    def ledger(self) -> Ledger:
        """The record of cycles."""
        return Ledger(self.run)

    @cached_property
    def registry(self) -> Registry:
        """The tracking store."""
        run = self.config.run
        model = self.config.retrain.registered_model or f"sidestack-{run.name}"
        return Registry(self.run, run.name, run.runs_dir, model)

    def step(self, as_of: date | None = None) -> Cycle | None:
        """Resume the running cycle, or begin one if enough data has arrived, and complete it.

        Args:
            as_of: cut the log at this date (exclusive); None: as configured.

        Returns:
            the cycle; None if there was nothing to do.

        Raises:
            SidestackError: a stage failed, or a part of the champion is missing; the next call resumes.
        """
        plan = self.ledger.under_way
        if plan is not None:
            log_line("retrain", f"cycle {plan.number} resumes: {plan.why}")
        else:
            if self.ledger.champion is not None:  # before a cycle begins that could not continue
                self.ledger.require_whole(self.ledger.champion, read_manifest)
            plan = self.decide(self._run_prepare(as_of), as_of)
            if plan is None:
                return None
            self.ledger.open(plan)
            log_line("retrain", f"cycle {plan.number}: {plan.why}")
        return self._run_cycle(plan)

    def decide(self, prepared: Path, as_of: date | None) -> Plan | None:
        """Return the plan of the next cycle, or None if none is due, and log why.

        Args:
            prepared: the snapshot. as_of: its end, exclusive.
        """
        settings, ledger = self.config.retrain, self.ledger
        dataset = read_dataset(prepared)
        dates, last, champion = dates_with_rows(dataset), ledger.trained, ledger.champion
        end = end_of(dataset, dates)
        followups = {task: dataset.spec.followup_days.get(task, 0.0) for task in dataset.spec.tasks}
        due, why = is_due(settings, dates, end, followups, last)
        if not due:
            log_line("retrain", f"nothing to do: {why}")
            return None
        policy, reason = policy_of(settings.encoder, len(ledger.ended), last)
        if champion is None and policy != "append":
            policy, reason = "append", ""
        done = {} if champion is None else champion.learned_to
        windows = windows_of(dates, end, followups, done, settings.judged_days)
        if not windows.learned:
            log_line("retrain", f"nothing to do: {why}; no date before those that are judged has new labels")
            return None
        whole = dates_before(windows.measured, dates)
        if policy == "rebuild":
            days = settings.encoder.rebuild_days
            windows = Windows(dates_before(windows.measured, dates, days), windows.measured)
        return Plan(
            number=len(ledger.cycles) + 1,
            at=datetime.now(UTC).replace(microsecond=0),
            why="; ".join(part for part in (why, reason) if part),
            champion=None if champion is None else champion.number,
            as_of=as_of,
            prepared=self._stored_path(prepared),
            newest=dates[-1],
            policy=policy,
            learned=windows.learned,
            measured=windows.measured,
            all_dates=whole,
            revised=self._find_revised(dataset, last, done),
        )

    def prepare(self, as_of: date | None) -> Stage:
        """Return the stage that makes the snapshot."""
        if as_of is None:
            return prepare_stage(self.config)
        prepare = self.config.prepare.model_copy(update={"as_of": as_of})
        return prepare_stage(self.config.model_copy(update={"prepare": prepare}))

    def pipeline(self) -> Pipeline:
        """Return the pipeline that runs stages. Their record is in files; the store is updated at a cycle's end."""
        return Pipeline(self.config.run, self.launcher)

    def _run_prepare(self, as_of: date | None) -> Path:
        stage, pipeline = self.prepare(as_of), self.pipeline()
        pipeline.run_stages([stage])
        self._preparing = pipeline.seconds
        return pipeline.done[stage.label]

    def _find_revised(self, dataset: Dataset, last: Cycle | None, done: Mapping[str, date]) -> tuple[date, ...]:
        if last is None or not done:
            return ()
        found = revised_dates(dataset, read_dataset(self.run / last.plan.prepared), done)
        if found:
            named = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
            log_line("retrain", f"{len(found)} dates that were learned have other rows now: {named}; not learned again")
        return found

    def _run_cycle(self, plan: Plan) -> Cycle:
        """Run a cycle's stages, and record the outcome."""
        verified = self._verified_inputs(plan)
        pipeline = self.pipeline()
        pipeline.done |= verified
        stages = cycle_stages(self.config, plan, verified)
        pipeline.run_stages(stages)
        made = {stage.label: pipeline.done[stage.label] for stage in stages}
        judgement = read_json(fetched(made["judge"]) / JUDGEMENT_FILE)
        gates = tuple(Gate(**gate) for gate in judgement["gates"])
        if edited := self.registry.foreign_change(self.ledger):
            gates += (Gate(name="registry", verdict="closed", rule="as it was left", why=edited),)
        candidate = self._version(plan, made, verified)
        outcome = Outcome(
            at=datetime.now(UTC).replace(microsecond=0),
            candidate=candidate,
            promoted=candidate is not None and may_promote(gates),
            gates=gates,
            figures=judgement["figures"],
            seconds={**self._preparing, **pipeline.seconds},
            stages={label: self._stored_path(path) for label, path in made.items()},
        )
        cycle = self.ledger.close(outcome)
        log_line("retrain", _verdict(plan, outcome))
        self.publish()
        delete_expired(self.run / plan.prepared)
        return cycle

    def publish(self, force: bool = False) -> None:
        """Send the store what it lacks; see `Registry.publish`."""
        self.registry.publish(self.ledger, without_values(plain(self.config)), force)

    def _verified_inputs(self, plan: Plan) -> dict[str, Path]:
        """Verify and return what was committed before the cycle, by the labels of its stages' inputs.

        Raises:
            StageError: a part of the champion is missing or was altered. CommitError: the snapshot was altered.
        """
        ledger = self.ledger
        found = {PREPARED: self.run / plan.prepared}
        verify(found[PREPARED])
        if plan.champion is not None:
            champion = ledger.versions[plan.champion]
            ledger.require_whole(champion)
            found[CHAMPION] = self.run / champion.ranker
            found |= {champion_encoder(name): self.run / path for name, path in champion.encoders.items()}
            found[BEFORE] = self.run / champion.dataset
        return found

    def _version(self, plan: Plan, made: Mapping[str, Path], verified: Mapping[str, Path]) -> Version | None:
        """Return the candidate that the stages made; None if the policy trains nothing."""
        if plan.policy == "never":
            return None
        encoders = {name: made.get(encoder_stage(self.config, name).label) for name in self.config.sid_names}
        champion = None if plan.champion is None else self.ledger.versions[plan.champion]
        return Version(
            number=plan.number,
            ranker=self._stored_path(made[f"ranker-{self.config.ranker.arm}"]),
            export=self._stored_path(made["ranker_export"]),
            dataset=self._stored_path(made["materialize"]),
            encoders={
                name: self._stored_path(path or verified[champion_encoder(name)]) for name, path in encoders.items()
            },
            learned_to=learned_to(plan.learned, champion),
        )

    def _stored_path(self, path: Path) -> Path:
        """Return a path relative to the run's folder, as in the record, so that a run can be moved."""
        return path.relative_to(self.run) if path.is_relative_to(self.run) else path.absolute()


def _verdict(plan: Plan, outcome: Outcome) -> str:
    if outcome.candidate is None:
        return f"cycle {plan.number}: measured; nothing is trained by policy {plan.policy}"
    if outcome.promoted:
        return f"cycle {plan.number}: promoted; its version is champion"
    closed = "; ".join(
        f"{gate.name}: {gate.verdict} ({gate.why or gate.rule})" for gate in outcome.gates if gate.verdict != "open"
    )
    champion = f"version {plan.champion} stays champion" if plan.champion else "there is no champion yet"
    return f"cycle {plan.number}: not promoted, {champion}: {closed}"
