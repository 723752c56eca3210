"""Drift of a set of SIDs: which SIDs changed, code use, and collisions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sidestack.encoder.evaluation import codebook_use
from sidestack.encoder.quantizers.usage import count_values
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import NULL, Ids, SidMaps, sid_maps
from sidestack.infra.config import parse
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.snapshot import CONTENT, Dataset
from sidestack.pipelines.drift.result import CodeUse, LayerUse, SidChange

_IDS_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class SidTable:
    """A set of SIDs of one snapshot: its spec, and the map from id to SID."""

    spec: SidSpec
    maps: SidMaps


def read_spec(dataset: Dataset, name: str) -> SidSpec:
    """Return the spec of one of a snapshot's SID sets.

    Raises:
        ConfigError: the spec cannot be read.
    """
    return parse(SidSpec, dataset.snapshot.sids[name].spec, f"{dataset.path}: SIDs {name!r}")


def sid_parts(dataset: Dataset, name: str) -> Sequence[PartitionEntry]:
    """Return the partitions that hold one of a snapshot's SID sets, aligned with the parts of the items or users."""
    listed = dataset.snapshot.sids[name]
    return dataset.partitions(listed.table(name, CONTENT[read_spec(dataset, name).entity]))


def read_sids(dataset: Dataset, name: str) -> SidTable:
    """Open one of a snapshot's SID sets; its partitions must be verified already."""
    spec = read_spec(dataset, name)
    return SidTable(spec, sid_maps(dataset.store, sid_parts(dataset, name), len(spec.chunk_sizes)))


def difference(now: SidSpec, before: SidSpec) -> str:
    """Return why digits of two sets cannot be compared one by one; empty if they can."""
    described = [
        f"{spec.entity}s, depth {spec.depth} x groups {spec.groups}, {spec.lines} x {spec.levels} values a digit"
        for spec in (now, before)
    ]
    return "" if described[0] == described[1] else f"SIDs are of {described[0]}; before of {described[1]}"


def compare_sids(now: SidTable, before: SidTable) -> SidChange | None:
    """Compare the SIDs of the ids in both sets; None if no id has a SID in both. The digits must be comparable."""
    compared = null_before = null_now = null_both = differing = 0
    changed_D = np.zeros(now.spec.digits, np.int64)
    rows = min(now.maps.rows, before.maps.rows)
    for start in range(0, rows, _IDS_AT_A_TIME):
        ids_N = np.arange(start, min(start + _IDS_AT_A_TIME, rows))
        now_NC, before_NC = now.maps.of(ids_N), before.maps.of(ids_N)
        has_now_N, has_before_N = now_NC[:, 0] != NULL, before_NC[:, 0] != NULL
        has_both_N = has_now_N & has_before_N
        compared += int(has_both_N.sum())
        null_before += int((has_now_N & ~has_before_N).sum())
        null_now += int((has_before_N & ~has_now_N).sum())
        null_both += int((~has_now_N & ~has_before_N).sum())
        differs_ND = _digits(now.spec, now_NC[has_both_N]) != _digits(before.spec, before_NC[has_both_N])
        differing += int(differs_ND.sum())
        changed_D += np.logical_or.accumulate(differs_ND, axis=1).sum(0)
    if not compared:
        return None
    return SidChange(
        compared=compared,
        null_before=null_before,
        null_now=null_now,
        null_both=null_both,
        changed_share={length: int(changed_D[length - 1]) / compared for length in _lengths(now.spec)},
        hamming=differing / compared,
    )


def _digits(spec: SidSpec, sids_NC: Ids) -> Ids:
    digits_ND: Ids = spec.unpack(torch.from_numpy(sids_NC)).numpy()
    return digits_ND


def _lengths(spec: SidSpec) -> list[int]:
    """Return the reported prefix lengths, in digits: whole layers, and the lengths in the events' columns."""
    return sorted({*range(spec.groups, spec.digits + 1, spec.groups), *spec.prefix_lengths})


def code_use(table: SidTable, scratch: Path) -> CodeUse:
    """Measure how the codes of a set are used, in bounded memory.

    Args:
        table: the set. scratch: a directory for temporary files.
    """
    spec = table.spec
    histogram_DR = torch.zeros(spec.digits, spec.radix, dtype=torch.int64)
    for sids_NC in table.maps.pieces():
        known_NC = torch.from_numpy(sids_NC[sids_NC[:, 0] != NULL])
        histogram_DR += count_values(spec.unpack(known_NC), spec.radix)
    use = codebook_use(histogram_DR)
    in_use_D = 1 - np.array(use["dead_share"])
    entropy_D = np.array(use["entropy_bits"]) / use["most_bits"]
    layers = zip(in_use_D.reshape(spec.depth, -1).mean(1), entropy_D.reshape(spec.depth, -1).mean(1), strict=True)
    counts = table.maps.count(scratch)
    rows = table.maps.rows - counts.null
    return CodeUse(
        rows=rows,
        null=counts.null,
        layers=tuple(LayerUse(in_use=float(in_use), entropy_share=float(entropy)) for in_use, entropy in layers),
        collision_share=1 - counts.alone / rows if rows else None,
    )
