"""All figures of drift; a figure that cannot be measured is null with a reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidestack.encoder.bundle import EncoderBundle
from sidestack.encoder.config import ENCODER_INPUT
from sidestack.infra.distributed import ALONE
from sidestack.infra.impressions import EVENTS, REQUESTS
from sidestack.infra.snapshot import CONTENT, Dataset
from sidestack.pipelines.drift.config import DriftConfig
from sidestack.pipelines.drift.dates import Dates, choose_dates
from sidestack.pipelines.drift.reconstruction import reconstruct
from sidestack.pipelines.drift.result import Drift, SidDrift
from sidestack.pipelines.drift.sample import sample_impressions
from sidestack.pipelines.drift.shift import column_shifts
from sidestack.pipelines.drift.sids import SidTable, code_use, compare_sids, difference, read_sids, sid_parts
from sidestack.pipelines.drift.traffic import label_rates, newcomers, volume

FIRST_CYCLE = "there is no snapshot before this one"
NO_LABELS = "no judged row of the new dates has a known label"


@dataclass(frozen=True)
class ComparedSnapshots:
    """The compared snapshots, and the encoders of the newer snapshot's SIDs, by set."""

    now: Dataset
    before: Dataset | None
    encoders: Mapping[str, EncoderBundle]


def measure(config: DriftConfig, snapshots: ComparedSnapshots, scratch: Path) -> Drift:
    """Return what changed in a cycle.

    Args:
        config: how drift is measured. snapshots: what is compared.
        scratch: a directory for temporary files.

    Raises:
        ConfigError, DataError, CommitError: see `pipelines.drift.stage.drift`.
    """
    now, before = snapshots.now, snapshots.before
    dates = choose_dates(config.new_dates, now, before)
    _verify(snapshots, dates)
    rates = label_rates(now, dates)
    shifts = _shifts(config, now, dates)
    new = newcomers(now, before, dates) if before is not None else {}
    missing = {} if new else dict.fromkeys(("new_items", "new_users"), FIRST_CYCLE)
    if not dates.earlier:
        missing |= dict.fromkeys(("impressions_a_day", "label_rates", "psi"), "there are no earlier dates")
    elif None in shifts.values():
        missing["psi"] = "the new dates, or the earlier ones, have no impression"
    for task, rate in rates.items():
        if rate.new is None:
            missing[f"label_rates.{task}"] = NO_LABELS
    return Drift(
        new_dates=dates.new,
        earlier_dates=dates.earlier,
        sids={name: _sid_drift(config, snapshots, name, scratch) for name in now.snapshot.sids},
        new_items=new.get("item"),
        new_users=new.get("user"),
        impressions_a_day=volume(now, dates),
        label_rates=rates,
        psi=shifts,
        missing=missing,
    )


def _verify(snapshots: ComparedSnapshots, dates: Dates) -> None:
    """Verify all partitions that are read: impressions, requests, SIDs, and the encoders' inputs."""
    now, before, days = snapshots.now, snapshots.before, {*dates.new, *dates.earlier}
    read = [entry for table in (EVENTS, REQUESTS) for entry in now.partitions(table) if entry.date in days]
    read += [entry for name in now.snapshot.sids for entry in sid_parts(now, name)]
    if before is not None:
        entities = {bundle.signals.entity for bundle in snapshots.encoders.values()}
        read += [entry for entity in sorted(entities) for entry in now.partitions(CONTENT[entity])]
        common = [name for name in before.snapshot.sids if name in now.snapshot.sids]
        before.verify(ALONE, [entry for name in common for entry in sid_parts(before, name)])
    now.verify(ALONE, read)


def _shifts(config: DriftConfig, now: Dataset, dates: Dates) -> dict[str, float | None]:
    """Return the PSI of each column; None for all if either side has no rows."""
    columns = [*now.spec.all_dense, *now.spec.all_sparse]
    rng = np.random.default_rng(config.seed)
    earlier, new = (sample_impressions(now, days, columns, rng) for days in (dates.earlier, dates.new))
    if not columns or not earlier or not new:
        return dict.fromkeys(columns)
    return dict(column_shifts(earlier, new, now.spec))


def _sid_drift(config: DriftConfig, snapshots: ComparedSnapshots, name: str, scratch: Path) -> SidDrift:
    sids = read_sids(snapshots.now, name)
    alone = SidDrift(entity=sids.spec.entity, now=code_use(sids, scratch))
    if snapshots.before is None:
        return alone.without(FIRST_CYCLE, "change", "before", "reconstruction")
    if name in snapshots.encoders:
        known = snapshots.before.spec.content(sids.spec.entity).rows
        losses = reconstruct(snapshots.encoders[name], snapshots.now, known, config)
        alone = alone.model_copy(update={"reconstruction": losses})
    else:
        alone = alone.without(f"there is no input {ENCODER_INPUT}{name}", "reconstruction")
    if name not in snapshots.before.snapshot.sids:
        return alone.without(f"the snapshot before has no SIDs {name!r}", "change", "before")
    return _with_change(alone, sids, read_sids(snapshots.before, name), scratch)


def _with_change(alone: SidDrift, sids: SidTable, before: SidTable, scratch: Path) -> SidDrift:
    """Add a SID set's earlier code use, and the change since."""
    is_same = before.spec.fingerprint == sids.spec.fingerprint
    both = alone.model_copy(update={"same_encoder": is_same, "before": code_use(before, scratch)})
    why = difference(sids.spec, before.spec)
    change = None if why else compare_sids(sids, before)
    if change is None:
        return both.without(why or f"no {sids.spec.entity} has a SID in both snapshots", "change")
    return both.model_copy(update={"change": change})
