"""The SIDs that an earlier snapshot published: which of them are taken over, and how many were moved.

Two encoders of one generation, one refreshed from the other, may assign different SIDs to an item. The snapshot that
lists a published SID determines which encoder assigned it, never the content of the store.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import NULL, SidMaps, sid_maps
from sidestack.infra.config import parse
from sidestack.infra.errors import DataError
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.snapshot import CONTENT, Dataset, Encoding, SidSet

Reusable = Mapping[tuple[str, str], PartitionEntry]
"""Partitions of published SIDs, by base table and slice."""

_ROWS_AT_A_TIME = 1 << 18


@dataclass(frozen=True)
class Published:
    """A set of SIDs of the encoder's generation, as an earlier snapshot lists it."""

    dataset: Dataset
    listed: SidSet
    spec: SidSpec

    def table(self, base: str) -> str:
        """Return the name of the table of its columns that is row-aligned with a base table."""
        return self.listed.table(self.spec.name, base)

    def maps(self) -> SidMaps:
        """Open its map from id to SID."""
        entries = self.dataset.partitions(self.table(CONTENT[self.spec.entity]))
        return sid_maps(self.dataset.store, entries, len(self.spec.chunk_sizes))


def find_published(snapshot: Dataset | None, spec: SidSpec) -> Published | None:
    """Return a snapshot's published set; None where it has no such set, or another generation of it."""
    listed = None if snapshot is None else snapshot.snapshot.sids.get(spec.name)
    if snapshot is None or listed is None:
        return None
    found = parse(SidSpec, listed.spec, f"{snapshot.path}: SIDs {spec.name!r}")
    return Published(snapshot, listed, found) if found.fingerprint == spec.fingerprint else None


def reusable_columns(published: Published, spec: SidSpec, dataset: Dataset) -> Reusable:
    """Return the published columns of a dataset's parts and dates.

    A date whose rows differ from the published snapshot's is not among them: its columns are rewritten, from the same
    SIDs of its items.

    Args:
        published: the set. spec: the requested spec. dataset: the snapshot, without these SIDs.

    Raises:
        DataError: published SIDs cannot stay as they are; names all reasons. CommitError: a partition is missing.
    """
    _require_keepable(published, spec, dataset)
    found = {}
    for base in published.listed.columns:
        own = {entry.slice: entry for entry in published.dataset.partitions(published.table(base))}
        known = {entry.slice: entry.digest for entry in published.dataset.partitions(base)}
        for entry in dataset.partitions(base):
            if known.get(entry.slice) == entry.digest:
                published.dataset.require_partition(own[entry.slice])
                found[base, entry.slice] = own[entry.slice]
    return found


def _require_keepable(published: Published, spec: SidSpec, dataset: Dataset) -> None:
    earlier, faults = published.dataset, []
    if earlier.store.resolve() != dataset.store.resolve():
        faults.append(f"its store is {earlier.store}, the dataset's is {dataset.store}")
    was, now = published.spec.model_dump(), spec.model_dump()
    faults += [f"{name}: {was[name]!r} there, {now[name]!r} here" for name in now if was[name] != now[name]]
    known = {entry.slice: entry.digest for entry in earlier.partitions(CONTENT[spec.entity])}
    for entry in dataset.partitions(CONTENT[spec.entity]):
        if known.get(entry.slice, entry.digest) != entry.digest:
            faults.append(f"{entry.table}/{entry.slice} has other rows there")
    if faults:
        raise DataError(
            f"published={earlier.path}: the SIDs {spec.name!r} cannot be kept: {'; '.join(faults)};"
            " materialize.published=move encodes all anew"
        )


def encoder_of(listed: SidSet, first: int) -> str:
    """Return the revision of the encoder that made the SIDs of the part whose new ids begin with `first`."""
    revision: str = listed.spec["fingerprint"]
    for encoding in listed.encodings:
        if encoding.first <= first:
            revision = encoding.revision
    return revision


def with_encodings(listed: SidSet, made: Mapping[int, str]) -> SidSet:
    """Return a set with the revisions of the encoders that made its SIDs.

    Args:
        listed: the set. made: the revision, by first new id, of each part that adds ids, in order.
    """
    encodings: list[Encoding] = []
    for first, revision in made.items():
        if not encodings or encodings[-1].revision != revision:
            encodings.append(Encoding(first=first, revision=revision))
    return listed.model_copy(update={"encodings": tuple(encodings)})


def moved_shares(published: Published, maps: SidMaps, spec: SidSpec) -> dict[int, float]:
    """Return, by prefix length, the share of the published ids whose prefix has changed.

    A SID that became null, or no longer is, counts as moved at every length.
    """
    before = published.maps()
    rows, same_L = min(before.rows, maps.rows), np.zeros(spec.digits + 1, np.int64)
    for start in range(0, rows, _ROWS_AT_A_TIME):
        ids_N = np.arange(start, min(start + _ROWS_AT_A_TIME, rows))
        same_N = _same_digits(_digits(before.of(ids_N), published.spec), _digits(maps.of(ids_N), spec))
        same_L += np.bincount(same_N, minlength=spec.digits + 1)
    kept_L = same_L[::-1].cumsum()[::-1]  # by length: the ids with at least that many leading digits unchanged
    return {length: int(rows - kept_L[length]) / rows for length in range(1, spec.digits + 1)} if rows else {}


def _digits(ids_NC: npt.NDArray[np.int64], spec: SidSpec) -> npt.NDArray[np.int64]:
    """Return the digits of ids, int64 [N, digits]; -1 throughout where an id is null."""
    null_N = ids_NC[:, 0] == NULL
    digits_ND = spec.unpack(torch.from_numpy(np.where(null_N[:, None], 0, ids_NC))).numpy()
    digits_ND[null_N] = -1
    return digits_ND


def _same_digits(before_ND: npt.NDArray[np.int64], after_ND: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count the leading digits that are the same, int64 [N]."""
    same_N: npt.NDArray[np.int64] = np.logical_and.accumulate(before_ND == after_ND, axis=1).sum(1)
    return same_N
