"""Stage `materialize`: encode items and users, and put the SID columns beside the rows they belong to.

One encoder makes one set of SIDs; each of several (`--input encoder.<name>=DIR`) makes a set under its own name, so
that a ranker can compare them on the same rows. The SIDs of a set and codebook are a *generation*: their columns are
partitions of the store, row-aligned with the items' (or users') parts, with the events (the advertised item) and with
the requests (the history, or the user). Only partitions that are not there yet are made; nothing else is written
again. The stage's output is the snapshot it was given plus these partitions, and each set's frozen codebook and
description (`encoder.sid_file`).

Of one encoder a published SID never changes: an item that a later part revises keeps the SID of the part that brought
it. So a date's columns depend on the parts that brought its items and on nothing that comes later.

A refreshed encoder (`encoder.refresh`) is of its start's generation, but may give the same item another SID. With
`--input published=DIR`, an earlier output of this stage, the columns of that snapshot's parts and dates are taken over
as they are, and the encoder gives SIDs to new items alone; with `materialize.published=move`, or without that input, it
encodes all items, into a folder of its own.

A part is encoded by all ranks, a file each at a time, a date's columns are written by one rank. Reading, encoding and
writing go on at the same time, a row group each, so memory is a few row groups and what the page cache holds of the
maps from id to SID.
"""

import bisect
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from encoder.bundle import EncoderBundle, load_bundle
from encoder.config import ENCODER_INPUT, MaterializeConfig
from encoder.published import Published, Taken, encoder_of, find_published, moved_shares, taken_over, with_encodings
from encoder.sid import DEFAULT_NAME, SidSpec, event_columns, sid_columns, with_sid_metadata
from encoder.sid_codebook import write_codebook
from encoder.sid_file import write_sid_file
from encoder.sid_map import MAP_FILE, NULL, SidMap, SidMaps, sid_maps
from encoder.signals import SignalBatch, signal_batch
from infra.checks import check_content, check_events
from infra.code import code_digest
from infra.config import digest, parse, plain
from infra.distributed import broadcast, raise_on_all_ranks
from infra.errors import ConfigError, DataError
from infra.parquet import RowGroup, read_row_group, row_groups
from infra.partitions import PartitionEntry
from infra.prefetch import prefetched
from infra.rows import CountedFile
from infra.snapshot import CONTENT, Dataset, SidSet, read_dataset, write_snapshot
from infra.stage import StageRun, run_stage
from infra.store import Making, Store, in_order

BLOCK_ROWS = 256
"""Rows that pass through the network at a time, always.

A matrix product may add up in another order for another number of rows or threads, and a last bit
decides a code that lies on a border. So a row is always encoded in a block of this many rows, at
the place in it that its row group gives it, by one thread: its id then depends on nothing else,
not on the batch size, nor on the number of ranks. More speed comes from more ranks.
"""
CODE = (
    "encoder/bundle.py", "encoder/fusion.py", "encoder/materialize.py", "encoder/quantizers", "encoder/search.py",
    "encoder/sid.py", "encoder/sid_map.py", "encoder/signals.py", "infra/take.py", "infra/parquet.py",
)  # fmt: skip
"""What decides the bytes of a partition of SIDs, beside rows and encoder."""

Columns = Callable[[pa.Table], dict[str, tuple[SidSpec, pa.Array]]]
"""Makes the SID columns of some rows."""


@dataclass(frozen=True)
class SidSetWork:
    """One encoder, and the set of SIDs that it makes for the items, or for the users.

    Attributes:
        bundle: the encoder. spec: of the SIDs. listed: what the snapshot will say of the set.
        published: the same generation's SIDs as an earlier snapshot lists them. taken: what is taken over of them.
        parts: the partitions of the items' (users') SIDs, once they are made.
    """

    bundle: EncoderBundle
    spec: SidSpec
    listed: SidSet
    published: Published | None
    taken: Taken
    parts: list[PartitionEntry] = field(default_factory=list)

    def table(self, base: str) -> str:
        """Return the name of the table of its columns beside a base table."""
        return self.listed.table(self.spec.name, base)

    @property
    def content(self) -> str:
        """The table whose rows are encoded."""
        return CONTENT[self.spec.entity]

    def maps(self, store: Store) -> SidMaps:
        """Return the map from id to SID over all parts made so far."""
        return sid_maps(store.path, self.parts, len(self.spec.chunk_sizes))


@dataclass(frozen=True)
class Work:
    """What all parts of the stage share."""

    dataset: Dataset
    store: Store
    sets: tuple[SidSetWork, ...]
    code: str
    batch_size: int


def materialize(run: StageRun[MaterializeConfig]) -> None:
    """Make the SID columns that the store lacks, and write the snapshot that has them into `run.out`.

    Raises:
        ConfigError: a prefix does not fit its encoder's digits, or is of no encoder.
        DataError: a row breaks the tables' contract, the dataset is not what the encoder takes, or published SIDs
            cannot be kept.
        SpecError: an encoder's weights are not those of its revision. CommitError: a partition was altered.
        PreemptedError: a rank was asked to stop; on every rank. Partitions that were committed are kept.
    """
    started = time.monotonic()
    with raise_on_all_ranks(run.world, "opening dataset and encoders"):
        work = _opened(run)
    encoded = sum(_write_parts(run, work, one) for one in work.sets)
    encoding = time.monotonic() - started
    entries = [entry for one in work.sets for entry in _write_dates(run, work, one)]
    with raise_on_all_ranks(run.world, "closing the snapshot"):
        if run.world.is_main:
            _close(run, work, entries, {"encoded": encoded, "encoding_seconds": encoding, "started": started})


def _opened(run: StageRun[MaterializeConfig]) -> Work:
    dataset = read_dataset(run.inputs["dataset"])
    earlier = read_dataset(run.inputs["published"]) if "published" in run.inputs else None
    paths = {
        name.removeprefix(ENCODER_INPUT): path for name, path in run.inputs.items() if name.startswith(ENCODER_INPUT)
    }
    for name in run.config.prefix_lengths:
        if name not in paths and name != DEFAULT_NAME:
            raise ConfigError(
                f"materialize.prefix_lengths.{name}: no encoder of this name; given are {', '.join(paths)}"
            )
    for name in paths:
        if name in dataset.snapshot.sids:
            raise DataError(f"{dataset.path}: has SIDs {name!r} already; materialize a snapshot without them")
    sets = tuple(_sid_set(run, dataset, earlier, name, path) for name, path in paths.items())
    return Work(dataset, Store(dataset.store), sets, code_digest(CODE), run.config.batch_size)


def _sid_set(
    run: StageRun[MaterializeConfig], dataset: Dataset, earlier: Dataset | None, name: str, encoder: Path
) -> SidSetWork:
    bundle = load_bundle(encoder, run.world.device)
    bundle.signals.require(dataset.spec, dataset.path)
    lengths = run.config.prefix_lengths.get(name, ())
    chosen = {"name": name, "prefix_lengths": lengths, "packing": run.config.packing}
    spec = parse(SidSpec, {**bundle.spec.model_dump(), **chosen}, f"materialize (SIDs {name!r})")
    published = find_published(earlier, spec)
    if published is None or run.config.published == "move":
        return SidSetWork(bundle, spec, listed_set(spec, bundle.revision), published, {})
    return SidSetWork(bundle, spec, published.listed, published, taken_over(published, spec, dataset))


def listed_set(spec: SidSpec, revision: str = "") -> SidSet:
    """Return what a snapshot lists of a set of SIDs.

    Args:
        spec: of the whole SID. revision: of the encoder that gives the first SIDs; empty: it began the generation.
    """
    columns = {CONTENT[spec.entity]: tuple(sid_columns(spec.name, spec))}
    for base in ("events", "requests"):
        names = tuple(name for name, held in event_columns(spec).items() if table_of(name, held) == base)
        if names:
            columns[base] = names
    refreshed = f"-{revision[:12]}" if revision not in ("", spec.fingerprint) else ""
    return SidSet(generation=f"{digest(plain(spec))[:12]}{refreshed}", spec=plain(spec), columns=columns)


def table_of(column: str, spec: SidSpec) -> str:
    """Return the table that an event's SID column is row-aligned with: users and histories are a request's."""
    is_request_s = spec.entity == "user" or column.startswith(spec.event_history_base)
    return "requests" if is_request_s else "events"


def _write_parts(run: StageRun[MaterializeConfig], work: Work, one: SidSetWork) -> int:
    """Encode the parts whose SIDs are neither taken over nor in the store, all ranks together, and return how many rows
    that were."""
    encoded, before = 0, ""
    for entry in work.dataset.partitions(one.content):
        part = one.taken.get((one.content, entry.slice))
        if part is None:
            part, rows = _part(run, work, one, entry, before)
            encoded += rows
        one.parts.append(part)
        before = _up_to(before, part)
    return encoded


def _up_to(before: str, part: PartitionEntry) -> str:
    """Return what names the SIDs of all items up to a part, from what names those before it."""
    return digest({"before": before, "part": part.digest}) if part.facts["new"] else before


def _part(
    run: StageRun[MaterializeConfig], work: Work, one: SidSetWork, entry: PartitionEntry, before: str
) -> tuple[PartitionEntry, int]:
    """Return the partition of a part's SIDs, and how many rows had to be encoded for it.

    Args:
        before: names the SIDs of the parts before it, which the rows that revise earlier ones repeat.
    """
    table, store = one.table(one.content), work.store
    key = digest(
        {
            "set": one.listed.generation,
            "encoder": one.bundle.revision,
            "of": entry.digest,
            "first": entry.facts["first"],
            "before": before if entry.rows > entry.facts["new"] else "",
            "code": work.code,
        }
    )
    found = broadcast(run.world, store.find(table, entry.slice, key))
    if found is not None:
        return found, 0
    work.dataset.verify(run.world, [entry])
    with (
        store.making(table, entry.slice, key, run.world) as made,
        run.log.progress(entry.rows, f"materialize: {one.content} encoded") as advance,
    ):
        _write_part(run, work, one, entry, made, advance)
    return store.entry(table, entry.slice, key), entry.rows


def _write_part(
    run: StageRun[MaterializeConfig],
    work: Work,
    one: SidSetWork,
    entry: PartitionEntry,
    made: Making,
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
    fields = _fields(sid_columns(one.spec.name, one.spec))

    def with_sids(table: pa.Table) -> dict[str, tuple[SidSpec, pa.Array]]:
        world.state.stop_if_asked()
        ids_N = table[content.id_column].to_numpy()
        sids_NC = _encoded(table, one, work.batch_size)
        is_revised_N = ids_N < first
        sids_NC[is_revised_N] = earlier.of(ids_N[is_revised_N])
        if not is_revised_N.all():
            own_map.write(int(ids_N[~is_revised_N][0]) - first, sids_NC[~is_revised_N])
        advance(table.num_rows * min(world.size, len(entry.files)))
        return _columns(one.spec.name, one.spec, sids_NC)

    made.schema = pa.schema(fields)
    made.numbers |= {"first": first, "new": new}
    folder = work.dataset.store / entry.path
    columns = [content.id_column, *one.bundle.signals.names]
    with raise_on_all_ranks(world, f"encoding the {one.content}"):
        for file in entry.files[world.rank :: world.size]:
            source = CountedFile(folder / file.name, file.rows)
            _write_aligned(source, columns, lambda rows, where: check_content(rows, content, where), with_sids, made)


def _fields(columns: Mapping[str, SidSpec], kind: pa.DataType | None = None) -> list[pa.Field]:
    return [with_sid_metadata(pa.field(name, kind or pa.int64()), spec) for name, spec in columns.items()]


def _write_aligned(
    source: CountedFile,
    columns: Sequence[str],
    check: Callable[[pa.Table, RowGroup], None],
    extend: Columns,
    made: Making,
) -> None:
    """Write a file's SID columns, row group for row group.

    While one row group is written here, a thread works on the next, and another reads and checks the one after it.
    """

    def checked() -> Iterator[pa.Table]:
        for group in row_groups([source.path]):
            rows = read_row_group(group, columns)
            check(rows, group)
            yield rows

    def extended(rows: pa.Table) -> pa.Table:
        return pa.table([column for _, column in extend(rows).values()], schema=made.schema)

    ahead = prefetched(map(extended, prefetched(checked())))
    with made.writing(source.path.name) as writer, contextlib.closing(ahead):
        for table in ahead:
            writer.write_group(table)


def _encoded(table: pa.Table, one: SidSetWork, batch_size: int) -> npt.NDArray[np.int64]:
    """Return the SIDs of a row group, encoded batch by batch: int64 [N, chunks]."""
    rows = -(-batch_size // BLOCK_ROWS) * BLOCK_ROWS  # whole blocks: see BLOCK_ROWS
    starts = range(0, table.num_rows, rows)
    batches = (signal_batch(table.slice(start, rows), one.bundle.signals) for start in starts)
    parts = [encode(one.bundle, one.spec, batch) for batch in batches]
    return np.concatenate([np.empty((0, len(one.spec.chunk_sizes)), np.int64), *parts])


def encode(
    bundle: EncoderBundle, spec: SidSpec, batch: SignalBatch, block_rows: int = BLOCK_ROWS
) -> npt.NDArray[np.int64]:
    """Return the SIDs of a batch, block by block, so that each is the same in any batch.

    Args:
        bundle: the encoder.
        spec: how digits become ids; its digits are the bundle's.
        batch: the items' signals, beginning at a block's border.
        block_rows: rows of a block; another number than `BLOCK_ROWS` must have been found to give the same.

    Returns:
        int64 [N, chunks]; `NULL` where every signal is missing.
    """
    device = bundle.model.weights_K.device
    with torch.inference_mode(), one_thread():
        blocks = batch.to(device).blocks(block_rows)
        digits_ND = torch.cat([bundle.model.digits(block.padded(block_rows))[: len(block)] for block in blocks])
        ids_NC = spec.pack(digits_ND).cpu()
        ids_NC[~batch.any_present] = NULL
    return ids_NC.numpy()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, so that the order in which a product adds up is the same on any machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_dates(run: StageRun[MaterializeConfig], work: Work, one: SidSetWork) -> list[PartitionEntry]:
    """Write a set's columns beside events and requests, each date by one rank, and return the partitions of all
    dates, on rank 0, which writes the snapshot; on the others none."""
    tables = {base: work.dataset.partitions(base) for base in one.listed.columns if base != one.content}
    date_key = _date_keys(work, one)
    wanted = [
        (base, entry, date_key(entry))
        for base, entries in tables.items()
        for entry in entries
        if (base, entry.slice) not in one.taken
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
        taken = [entry for (base, _), entry in one.taken.items() if base != one.content]
        return [*taken, *(work.store.entry(one.table(base), entry.slice, key) for base, entry, key in wanted)]


def _date_keys(work: Work, one: SidSetWork) -> Callable[[PartitionEntry], str]:
    """Return what names a date's columns: they depend on its rows, and on the parts that brought the items (users)
    among them."""
    bringing = [part for part in one.parts if part.facts["new"]]
    firsts = [part.facts["first"] for part in bringing]
    up_to = [""]  # one digest of all parts up to each, so that a date's key is as quick however many parts there are
    for part in bringing:
        up_to.append(_up_to(up_to[-1], part))

    def date_key(entry: PartitionEntry) -> str:
        parts = up_to[bisect.bisect_right(firsts, entry.facts.get(f"max_{one.spec.entity}_id", -1))]
        return digest({"set": one.listed.generation, "of": entry.digest, "parts": parts, "code": work.code})

    return date_key


def _write_date(work: Work, one: SidSetWork, maps: SidMaps, base: str, entry: PartitionEntry, key: str) -> None:
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
    with work.store.making(one.table(base), entry.slice, key) as made:
        made.schema = pa.schema(_fields(columns, kind))
        for file in entry.files:
            source = CountedFile(work.dataset.store / entry.path / file.name, file.rows)
            _write_aligned(
                source, [column], lambda rows, where: check_events(rows, work.dataset.spec, where), with_sids, made
            )


def _with_prefixes(
    stem: str, spec: SidSpec, sids_NC: npt.NDArray[np.int64], offsets: npt.NDArray[np.int32] | None
) -> dict[str, tuple[SidSpec, pa.Array]]:
    """Return the columns of whole SIDs and of their prefixes."""
    columns = _columns(stem, spec, sids_NC, offsets)
    for length in spec.prefix_lengths:
        if length < spec.digits:
            columns |= _columns(stem, spec.of_prefix(length), shortened(spec, sids_NC, length), offsets)
    return columns


def shortened(spec: SidSpec, ids_NC: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Cut SIDs to a prefix, `NULL` staying `NULL`: int64 [N, chunks of the prefix]."""
    null_N = ids_NC[:, 0] == NULL
    cut_NC = spec.cut(torch.from_numpy(np.where(null_N[:, None], 0, ids_NC)), length).numpy()
    cut_NC[null_N] = NULL
    return cut_NC


def _columns(
    stem: str, spec: SidSpec, ids_NC: npt.NDArray[np.int64], offsets: npt.NDArray[np.int32] | None = None
) -> dict[str, tuple[SidSpec, pa.Array]]:
    """Return one column a chunk, by name, as values, or as lists where offsets are given."""
    found = {}
    for chunk, (name, column_spec) in enumerate(sid_columns(stem, spec).items()):
        ids_N = np.ascontiguousarray(ids_NC[:, chunk])
        column = pa.array(ids_N, mask=ids_NC[:, 0] == NULL)
        if offsets is not None:
            column = pa.ListArray.from_arrays(pa.array(offsets), column)
        found[name] = (column_spec, column)
    return found


def _close(
    run: StageRun[MaterializeConfig], work: Work, dates: Sequence[PartitionEntry], told: Mapping[str, float]
) -> None:
    """Write the snapshot, the codebooks and the sets' descriptions, and sum up."""
    before = work.dataset.snapshot
    parts = [entry for one in work.sets for entry in one.parts]
    partitions = in_order([*before.partitions, *parts, *dates])
    sids = {**before.sids, **{one.spec.name: _with_encodings(one) for one in work.sets}}
    changed = {"store": str(work.store.path), "sids": sids, "partitions": tuple(partitions)}
    write_snapshot(run.out, run.out, work.dataset.spec, parse(type(before), {**dict(before), **changed}, "snapshot"))
    for one in work.sets:
        write_codebook(run.out, one.spec, one.bundle.model.quantizer.codewords().detach())
        write_sid_file(run.out, one.spec, one.listed.columns)
    found = {one.spec.name: _summary(run, work, one) for one in work.sets}
    run.facts["fingerprints"] = {one.spec.name: one.spec.fingerprint for one in work.sets}
    run.facts["revisions"] = {one.spec.name: one.bundle.revision for one in work.sets}
    seconds = time.monotonic() - told["started"]
    run.log.summary(
        {
            **{one.content: work.dataset.spec.content(one.spec.entity).rows for one in work.sets},
            "sids": found,
            "encoded": told["encoded"],
            "encoding_seconds": told["encoding_seconds"],
            "items_per_second": told["encoded"] / max(told["encoding_seconds"], 1e-9),
            "writing_seconds": seconds - told["encoding_seconds"],
            "seconds": seconds,
        }
    )
    for one in work.sets:
        of_set = found[one.spec.name]
        run.log.say(
            f"materialize: {one.spec.name}: {of_set['rows']:,} {one.content}, {of_set['distinct']:,} different SIDs"
            f" ({of_set['unique_share']:.1%}), {of_set['null']:,} null{_moved_words(one, of_set['moved'])}"
        )


def _with_encodings(one: SidSetWork) -> SidSet:
    """Return what the snapshot lists of a set: each part is of the encoder given, unless it was taken over."""
    made = {}
    for part in one.parts:
        if part.facts["new"]:
            first = part.facts["first"]
            is_taken = (one.content, part.slice) in one.taken
            made[first] = encoder_of(one.listed, first) if is_taken else one.bundle.revision
    return with_encodings(one.listed, made)


def _moved_words(one: SidSetWork, moved: Mapping[int, float]) -> str:
    """Return what is told of published SIDs, which a refreshed encoder may move."""
    if moved:
        return f"; of those published {moved[max(moved)]:.1%} were moved, {moved[1]:.1%} in the first digit"
    if one.published is None and one.bundle.revision != one.spec.fingerprint:
        return "; no SIDs of its generation were given as published, so the refreshed encoder encoded all"
    return ""


def _summary(run: StageRun[MaterializeConfig], work: Work, one: SidSetWork) -> dict[str, Any]:
    maps = one.maps(work.store)
    null, distinct, _ = maps.count(run.out)
    return {
        "rows": maps.rows,
        "null": null,
        "distinct": distinct,
        "unique_share": distinct / max(maps.rows - null, 1),
        "moved": {} if one.published is None else moved_shares(one.published, maps, one.spec),
        "spec": plain(one.spec),
    }


if __name__ == "__main__":
    inputs = ["dataset", f"{ENCODER_INPUT}*"]
    run_stage("materialize", "materialize", MaterializeConfig, inputs, materialize, optional=["published"])
