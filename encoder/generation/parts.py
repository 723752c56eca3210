"""The SIDs of items (users): each part is encoded once, by all ranks, one file per rank at a time."""

from collections.abc import Callable

import pyarrow as pa
import torch

from sidestack.encoder.config import MaterializeConfig
from sidestack.encoder.encoding import encode_table
from sidestack.encoder.generation.aligned import chunk_columns, sid_fields, write_aligned
from sidestack.encoder.generation.sets import MaterializeWork, SidSetWork
from sidestack.encoder.sid.columns import sid_columns
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import MAP_FILE, SidMap
from sidestack.infra.checks import check_content
from sidestack.infra.config import digest
from sidestack.infra.distributed import broadcast, raise_on_all_ranks
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.rows import CountedFile
from sidestack.infra.stage import StageRun
from sidestack.infra.store import NewPartition


def write_parts(run: StageRun[MaterializeConfig], work: MaterializeWork, one: SidSetWork) -> int:
    """Encode the parts whose SIDs are neither taken over nor in the store, on all ranks; return the number of rows."""
    encoded, before = 0, ""
    for entry in work.dataset.partitions(one.content):
        part = one.reusable.get((one.content, entry.slice))
        if part is None:
            part, rows = _part(run, work, one, entry, before)
            encoded += rows
        one.parts.append(part)
        before = chained_digest(before, part)
    return encoded


def chained_digest(before: str, part: PartitionEntry) -> str:
    """Return the digest that identifies the SIDs of all items up to a part, from the digest of the parts before."""
    return digest({"before": before, "part": part.digest}) if part.facts["new"] else before


def _part(
    run: StageRun[MaterializeConfig], work: MaterializeWork, one: SidSetWork, entry: PartitionEntry, before: str
) -> tuple[PartitionEntry, int]:
    """Return the partition of a part's SIDs, and how many rows had to be encoded for it.

    Args:
        before: digest of the SIDs of the parts before it; rows that revise earlier ones repeat these SIDs.
    """
    table, store = one.table(one.content), work.store
    key = digest(
        {
            "set": one.listed.generation,
            "encoder": one.bundle.revision,
            "of": entry.digest,
            "first": entry.facts["first"],
            "before": before if entry.rows > entry.facts["new"] else "",
            "code": one.code,
        }
    )
    found = broadcast(run.world, store.find(table, entry.slice, key))
    if found is not None:
        return found, 0
    work.dataset.verify(run.world, [entry])
    with (
        store.new_partition(table, entry.slice, key, run.world) as made,
        run.log.progress(entry.rows, f"materialize: {one.content} encoded") as advance,
    ):
        _write_part(run, work, one, entry, made, advance)
    return store.entry(table, entry.slice, key), entry.rows


def _write_part(
    run: StageRun[MaterializeConfig],
    work: MaterializeWork,
    one: SidSetWork,
    entry: PartitionEntry,
    made: NewPartition,
    advance: Callable[[int], None],
) -> None:
    """Encode this rank's files of a part."""
    world, first, new = run.world, entry.facts["first"], entry.facts["new"]
    own_map = SidMap(made.path / MAP_FILE, new, len(one.spec.chunk_sizes))
    with raise_on_all_ranks(world, "creating the map from id to SID"):
        if world.is_main:
            own_map.create()
    earlier = one.maps(work.store)
    content = work.dataset.spec.content(one.spec.entity)
    fields = sid_fields(sid_columns(one.spec.name, one.spec))

    def with_sids(table: pa.Table) -> dict[str, tuple[SidSpec, pa.Array]]:
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # a worker thread starts with device 0
        world.state.stop_if_asked()
        ids_N = table[content.id_column].to_numpy()
        sids_NC = encode_table(one.bundle, one.spec, table, work.batch_size)
        is_revised_N = ids_N < first
        sids_NC[is_revised_N] = earlier.of(ids_N[is_revised_N])
        if not is_revised_N.all():
            own_map.write(int(ids_N[~is_revised_N][0]) - first, sids_NC[~is_revised_N])
        advance(table.num_rows * min(world.size, len(entry.files)))
        return chunk_columns(one.spec.name, one.spec, sids_NC)

    made.schema = pa.schema(fields)
    made.numbers |= {"first": first, "new": new}
    folder = work.dataset.store / entry.path
    columns = [content.id_column, *one.bundle.signals.names]
    with raise_on_all_ranks(world, f"encoding the {one.content}"):
        for file in entry.files[world.rank :: world.size]:
            source = CountedFile(folder / file.name, file.rows)
            write_aligned(source, columns, lambda rows, where: check_content(rows, content, where), with_sids, made)
