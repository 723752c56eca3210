"""Read the SIDs that stage `materialize` wrote, and compute the expected ones."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.sid.columns import read_sid_spec
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.signals import signal_batch
from sidestack.infra.snapshot import read_dataset
from tests.datasets import content

CPU = torch.device("cpu")
OTHER = {
    "quantizer": {"kind": "rqvae", "codes": 16, "depth": 2, "groups": 1, "group_dim": 6},
    "training": {"epochs": 1},
}


def copied(dataset: Path, to: Path) -> Path:
    shutil.copytree(dataset, to)
    return to


def sids_of(path: Path, base: str = "items", name: str = "sid") -> pa.Table:
    """Read the SID columns beside a table."""
    dataset = read_dataset(path)
    return content(dataset, dataset.snapshot.sids[name].table(name, base))


def listed(path: Path, beginning: str = "") -> dict[str, str]:
    """Return the paths and digests of a snapshot's partitions, by table and slice."""
    entries = [entry for entry in read_dataset(path).snapshot.partitions if entry.table.startswith(beginning)]
    return {f"{entry.table} {entry.slice}": f"{entry.path} {entry.digest}" for entry in entries}


def encoded(path: Path) -> int:
    """Return how many rows the stage encoded."""
    number: int = json.loads((path / "summary.json").read_text())["encoded"]
    return number


def expected_digits(encoder: Path, table: pa.Table) -> list[list[int] | None]:
    """Encode items one by one, without blocks, map or packing."""
    bundle = load_bundle(encoder, CPU)
    batch = signal_batch(table, bundle.signals)
    rows = [bundle.model.digits(batch.sliced(i, i + 1))[0].tolist() for i in range(len(batch))]
    return [row if present else None for row, present in zip(rows, batch.any_present.tolist(), strict=True)]


def packed(digits: list[int] | None, length: int | None = None) -> int | None:
    """Return ternary digits as one number, the first digit most significant."""
    return None if digits is None else int("".join(map(str, digits[:length])), 3)


def load_bundle_spec(materialized: Path, name: str = "sid") -> SidSpec:
    return read_sid_spec(sids_of(materialized, name=name).schema.field(name))
