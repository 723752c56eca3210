"""The SIDs of events and requests: one rank per date looks them up by id and cuts them to prefixes."""

import bisect
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from sidestack.encoder.config import MaterializeConfig
from sidestack.encoder.generation.aligned import chunk_columns, sid_fields, write_aligned
from sidestack.encoder.generation.parts import chained_digest
from sidestack.encoder.generation.sets import MaterializeWork, SidSetWork
from sidestack.encoder.sid.columns import event_columns
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import NULL, SidMaps
from sidestack.infra.checks import check_events
from sidestack.infra.config import digest
from sidestack.infra.distributed import broadcast, raise_on_all_ranks
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.rows import CountedFile
from sidestack.infra.stage import StageRun


def write_dates(run: StageRun[MaterializeConfig], work: MaterializeWork, one: SidSetWork) -> list[PartitionEntry]:
    """Write a set's columns for events and requests, one rank per date.

    Return the partitions of all dates on rank 0, which writes the snapshot, and none on the other ranks.
    """
    tables = {base: work.dataset.partitions(base) for base in one.listed.columns if base != one.content}
    date_key = _date_keys(work, one)
    wanted = [
        (base, entry, date_key(entry))
        for base, entries in tables.items()
        for entry in entries
        if (base, entry.slice) not in one.reusable
    ]
    missing = None
    with raise_on_all_ranks(run.world, "looking for the dates that lack SIDs"):
        if run.world.is_main:
            missing = [
                place for place in wanted if work.store.find(one.table(place[0]), place[1].slice, place[2]) is None
            ]
    missing = broadcast(run.world, missing)
    assert missing is not None
    with (
        raise_on_all_ranks(run.world, "writing the SIDs of the events"),
        run.log.progress(len(missing), f"materialize: dates with {one.spec.name}") as advance,
    ):
        maps = one.maps(work.store)
        for base, entry, key in missing[run.world.rank :: run.world.size]:
            run.world.state.stop_if_asked()
            _write_date(work, one, maps, base, entry, key)
            advance(run.world.size)
    with raise_on_all_ranks(run.world, "listing the SIDs of the events"):
        if not run.world.is_main:
            return []
        reused = [entry for (base, _), entry in one.reusable.items() if base != one.content]
        return [*reused, *(work.store.entry(one.table(base), entry.slice, key) for base, entry, key in wanted)]


def _date_keys(work: MaterializeWork, one: SidSetWork) -> Callable[[PartitionEntry], str]:
    """Return the function that makes a date's key, from the date's rows and the parts that added its items (users)."""
    bringing = [part for part in one.parts if part.facts["new"]]
    firsts = [part.facts["first"] for part in bringing]
    named = [""]  # a digest of all parts up to each, so that the cost of a date's key does not depend on their number
    for part in bringing:
        named.append(chained_digest(named[-1], part))

    def date_key(entry: PartitionEntry) -> str:
        parts = named[bisect.bisect_right(firsts, entry.facts.get(f"max_{one.spec.entity}_id", -1))]
        return digest({"set": one.listed.generation, "of": entry.digest, "parts": parts, "code": one.code})

    return date_key


def _write_date(
    work: MaterializeWork, one: SidSetWork, maps: SidMaps, base: str, entry: PartitionEntry, key: str
) -> None:
    spec = one.spec
    is_history = base == "requests" and spec.entity == "item"
    column = "history_item_ids" if is_history else f"{spec.entity}_id"
    stem = spec.event_history_base if is_history else spec.event_base

    def with_sids(table: pa.Table) -> dict[str, tuple[SidSpec, pa.Array]]:
        ids = table[column].combine_chunks()
        if not is_history:
            return _with_prefixes(stem, spec, maps.of(ids.to_numpy()), None)
        offsets_B1 = np.concatenate([[0], np.cumsum(ids.value_lengths().to_numpy())]).astype(np.int32)
        return _with_prefixes(stem, spec, maps.of(ids.flatten().to_numpy()), offsets_B1)

    work.dataset.verify_partition(entry)
    kind = pa.list_(pa.int64()) if is_history else pa.int64()
    names = one.listed.columns[base]
    columns = {name: held for name, held in event_columns(spec).items() if name in names}
    with work.store.new_partition(one.table(base), entry.slice, key) as made:
        made.schema = pa.schema(sid_fields(columns, kind))
        for file in entry.files:
            source = CountedFile(work.dataset.store / entry.path / file.name, file.rows)
            write_aligned(
                source, [column], lambda rows, where: check_events(rows, work.dataset.spec, where), with_sids, made
            )


def _with_prefixes(
    stem: str, spec: SidSpec, sids_NC: npt.NDArray[np.int64], offsets: npt.NDArray[np.int32] | None
) -> dict[str, tuple[SidSpec, pa.Array]]:
    """Return the columns of whole SIDs and of their prefixes."""
    columns = chunk_columns(stem, spec, sids_NC, offsets)
    for length in spec.prefix_lengths:
        if length < spec.digits:
            columns |= chunk_columns(stem, spec.of_prefix(length), cut_to_prefix(spec, sids_NC, length), offsets)
    return columns


def cut_to_prefix(spec: SidSpec, ids_NC: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Cut SIDs to a prefix, `NULL` staying `NULL`: int64 [N, chunks of the prefix]."""
    null_N = ids_NC[:, 0] == NULL
    cut_NC = spec.cut(torch.from_numpy(np.where(null_N[:, None], 0, ids_NC)), length).numpy()
    cut_NC[null_N] = NULL
    return cut_NC
