"""Stage `drift`: what changed in data, encoders and SIDs since the last retraining cycle.

Inputs are the materialized snapshot `now`, the last cycle's snapshot `before` (none in the first cycle), and the
encoders of `now`'s SIDs (`encoder.<set>`). The output is `drift.json` and the same as a table;
`pipelines.drift.result.figures` names its numbers.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from sidestack.encoder.bundle import EncoderBundle, load_bundle
from sidestack.encoder.config import ENCODER_INPUT
from sidestack.infra.errors import DataError, SpecError
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.stage import StageRun
from sidestack.pipelines.drift.config import DriftConfig
from sidestack.pipelines.drift.measure import ComparedSnapshots, measure
from sidestack.pipelines.drift.result import DRIFT_FILE, figures
from sidestack.pipelines.drift.table import as_text

INPUTS = ("now", f"{ENCODER_INPUT}*")
OPTIONAL = ("before",)
TABLE_FILE = "table.txt"


def drift(run: StageRun[DriftConfig]) -> None:
    """Measure drift and write it into `run.out`, on rank 0 only.

    Raises:
        ConfigError: there are no events in `drift.new_dates`. SpecError: an encoder did not make the snapshot's SIDs.
        DataError: the snapshots are not from one growing dataset, or rows break the tables' contract.
        CommitError: a partition was altered.
    """
    if not run.world.is_main:
        return
    found = measure(run.config, _open_snapshots(run.inputs), run.out)
    table = as_text(found)
    (run.out / DRIFT_FILE).write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (run.out / TABLE_FILE).write_text(table, encoding="utf-8")
    run.log.summary(figures(found.model_dump(mode="json")))
    print(table, end="", flush=True)  # the stage's result: on stdout, apart from the log


def _open_snapshots(inputs: Mapping[str, Path]) -> ComparedSnapshots:
    now = read_dataset(inputs["now"])
    before = read_dataset(inputs["before"]) if "before" in inputs else None
    if before is not None:
        _require_growth(now, before)
    encoders = {
        name.removeprefix(ENCODER_INPUT): load_bundle(path, torch.device("cpu"))
        for name, path in inputs.items()
        if name.startswith(ENCODER_INPUT)
    }
    for name, bundle in encoders.items():
        _require_own(now, name, bundle)
    return ComparedSnapshots(now, before, encoders)


def _require_growth(now: Dataset, before: Dataset) -> None:
    """Check that the snapshot has all ids of the previous one: tables of items and users only grow."""
    tables = {
        "items": (now.spec.num_items, before.spec.num_items),
        "users": (now.spec.num_users, before.spec.num_users),
    }
    for table, (has, had) in tables.items():
        if has < had:
            rule = "`now` must be the later snapshot of a dataset"
            raise DataError(f"{now.path}: has {has:,} {table}, {before.path} has {had:,}: {rule}")


def _require_own(now: Dataset, name: str, bundle: EncoderBundle) -> None:
    """Check that the given encoder made the SID set of its name."""
    listed = now.snapshot.sids.get(name)
    if listed is None:
        known = ", ".join(now.snapshot.sids) or "none"
        raise DataError(f"{ENCODER_INPUT}{name}: {now.path} has no SIDs of this name; it has {known}")
    found = listed.spec["fingerprint"]
    if found != bundle.spec.fingerprint:
        raise SpecError(
            f"{ENCODER_INPUT}{name}: has the fingerprint {bundle.spec.fingerprint[:16]}…, the SIDs of {now.path} are of"
            f" {found[:16]}…"
        )
