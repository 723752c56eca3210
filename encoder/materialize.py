"""Stage `materialize`: encode every item (and user), and write the tables again with SID columns.

One encoder gives one set of SIDs; each of several (`--input encoder.<name>=DIR`) gives a set under its own name, so
that a ranker can hold them against each other on the same rows. Beside the tables lies each set's frozen codebook.

The items, and the users where an encoder is of users, are cut into segments of whole row groups, which are shared out
over the ranks. A segment is read once and written once, as a file of its own, and its SIDs go into a map on disk that
all ranks share; with the maps whole, every rank rewrites its share of the events' files. Reading, encoding and writing
go on at the same time, a row group each, so memory is a few row groups and what the page cache gives the map.
"""

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from encoder.bundle import EncoderBundle, load_bundle
from encoder.config import ENCODER_INPUT, MaterializeConfig
from encoder.sid import DEFAULT_NAME, SidSpec, sid_columns, with_sid_metadata
from encoder.sid_codebook import write_codebook
from encoder.sid_map import NULL, SidMap
from encoder.signals import SignalBatch, signal_batch
from encoder.write_behind import WriteBehind
from infra.config import parse
from infra.distributed import together
from infra.errors import ConfigError, DataError
from infra.parquet import RowGroup, TableWriter, open_parquet, read_row_group, require_columns, row_groups
from infra.prefetch import prefetched
from infra.rows import Check
from infra.stage import StageRun, run_stage
from infra.tables import Dataset, Entity, check_content, check_events, read_dataset, write_spec

BLOCK_ROWS = 256
"""Rows that pass through the network at a time, always.

A matrix product may add up in another order for another number of rows or threads, and a last bit
decides a code that lies on a border. So a row is always encoded in a block of this many rows, at
the place in it that its row group gives it, by one thread: its id then depends on nothing else,
not on the batch size, nor on the number of ranks. More speed comes from more ranks.
"""
SEGMENT_ROWS = 1 << 17
"""The most rows of a file of items or users that is written, and so of what one rank encodes at a time.

A file is written by one rank alone, and its bytes are the same for any number of ranks. A longer file becomes several,
so that the ranks share the work however few files there were.
"""

Extend = Callable[[pa.Table, RowGroup], pa.Table]


@dataclass(frozen=True)
class SidSet:
    """One encoder, and the SIDs that it gives to the items, or to the users."""

    bundle: EncoderBundle
    spec: SidSpec
    sids: SidMap


@dataclass(frozen=True)
class Work:
    """What all parts of the stage share."""

    dataset: Dataset
    sets: tuple[SidSet, ...]
    out: Path

    def sets_of(self, entity: Entity) -> tuple[SidSet, ...]:
        """Give the sets of the items, or of the users."""
        return tuple(one for one in self.sets if one.spec.entity == entity)

    @property
    def entities(self) -> tuple[Entity, ...]:
        """Whose table is written anew: the items', whose check is part of this stage, and the users' if need be."""
        return ("item", "user") if self.sets_of("user") else ("item",)


def materialize(run: StageRun[MaterializeConfig]) -> None:
    """Write the dataset again, with SID columns, into `run.out`.

    Raises:
        ConfigError: a prefix does not fit its encoder's digits, or is of no encoder.
        DataError: a row breaks the tables' contract, or the dataset is not what the encoder takes.
        SpecError: an encoder's weights are not those of its fingerprint.
    """
    world, started = run.world, time.monotonic()
    with together(world, "opening dataset and encoders"):
        work = _opened(run)
        if world.is_main:
            for one in work.sets:
                one.sids.create()
    for entity in work.entities:
        with together(world, f"encoding the {entity}s"):
            _write_content(run, work, entity)
    encoded = time.monotonic()
    with together(world, "writing the events"):
        _write_events_and_others(run, work)
    with together(world, "closing the tables"):
        if world.is_main:
            _close(run, work, started, encoded)


def _opened(run: StageRun[MaterializeConfig]) -> Work:
    dataset = read_dataset(run.inputs["dataset"])
    paths = {name.removeprefix(ENCODER_INPUT): path for name, path in run.inputs.items() if name != "dataset"}
    for name in run.config.prefix_lengths:
        if name not in paths and name != DEFAULT_NAME:
            raise ConfigError(
                f"materialize.prefix_lengths.{name}: no encoder of this name; given are {', '.join(paths)}"
            )
    work = Work(dataset, tuple(_sid_set(run, dataset, name, path) for name, path in paths.items()), run.out)
    for entity in work.entities:
        rows = sum(group.rows for group in row_groups(dataset.content_files(entity)))
        expected = dataset.spec.content(entity).rows
        if rows != expected:
            raise DataError(f"{dataset.path}/{entity}s: has {rows} rows, dataset.json says {expected}")
    return work


def _sid_set(run: StageRun[MaterializeConfig], dataset: Dataset, name: str, encoder: Path) -> SidSet:
    bundle = load_bundle(encoder, run.world.device)
    bundle.signals.require(dataset.spec, dataset.path)
    lengths = run.config.prefix_lengths.get(name, ())
    rows = dataset.spec.content(bundle.signals.entity).rows
    chosen = {"name": name, "prefix_lengths": lengths, "packing": run.config.packing}
    spec = parse(SidSpec, {**bundle.spec.model_dump(), **chosen}, f"materialize (SIDs {name!r})")
    sids = SidMap(run.out / "sid-map" / f"{name}.int64", rows, len(spec.chunk_sizes))
    return SidSet(bundle, spec, sids)


@dataclass(frozen=True)
class Segment:
    """Consecutive row groups of a file, and the file they become."""

    source: Path
    groups: tuple[RowGroup, ...]
    target: Path


def _write_content(run: StageRun[MaterializeConfig], work: Work, entity: Entity) -> None:
    """Encode this rank's segments of the items or the users, into the maps and into their files."""
    sets, content = work.sets_of(entity), work.dataset.spec.content(entity)

    def with_sids(table: pa.Table, group: RowGroup) -> pa.Table:
        extended = table
        for one in sets:
            ids_NC = _encoded(table, one, run.config.batch_size)
            one.sids.write(group.start, ids_NC)
            extended = _with_columns(extended, one.spec.name, one.spec, ids_NC, group)
        advance(table.num_rows)
        return extended

    def check(table: pa.Table, group: RowGroup) -> None:
        for one in sets:
            require_columns(table.schema, one.bundle.signals.columns, group)
        check_content(table, content, group)

    own = _segments(work, work.dataset.content_files(entity))[run.world.rank :: run.world.size]
    rows = sum(group.rows for segment in own for group in segment.groups)
    with run.log.progress(rows, f"materialize: {entity}s encoded") as advance:
        for segment in own:
            _rewrite(segment, check, with_sids)


def _segments(work: Work, files: tuple[Path, ...]) -> list[Segment]:
    """Cut every file of the items or the users into segments; one that is not cut keeps its name."""
    segments = []
    for path, groups in _by_file(files):
        target = work.out / path.relative_to(work.dataset.path)
        parts = list(_runs(groups, SEGMENT_ROWS))
        names = [f"{path.stem}-{part:05d}{path.suffix}" for part in range(len(parts))] if parts[1:] else [path.name]
        segments += [Segment(path, part, target.with_name(name)) for part, name in zip(parts, names, strict=True)]
    targets = [segment.target for segment in segments]
    if targets != sorted(set(targets)):
        raise DataError(
            f"{work.dataset.path}: files of more than {SEGMENT_ROWS:,} rows are cut, and the parts' names would not"
            " sort as the rows do; name the files part-00000.parquet, part-00001.parquet, ..."
        )
    return segments


def _runs(groups: Sequence[RowGroup], rows: int) -> Iterator[tuple[RowGroup, ...]]:
    """Cut row groups into runs of at most so many rows, or of one row group; no row group is one empty run."""
    start = 0
    for end in range(1, len(groups) + 1):
        if end == len(groups) or sum(group.rows for group in groups[start : end + 1]) > rows:
            yield tuple(groups[start:end])
            start = end
    if not groups:
        yield ()


def _encoded(table: pa.Table, one: SidSet, batch_size: int) -> npt.NDArray[np.int64]:
    """Give the SIDs of a row group, batch by batch."""
    rows = -(-batch_size // BLOCK_ROWS) * BLOCK_ROWS  # whole blocks: see BLOCK_ROWS
    starts = range(0, table.num_rows, rows)
    batches = (signal_batch(table.slice(start, rows), one.bundle.signals) for start in starts)
    parts = [encode(one.bundle, one.spec, batch) for batch in batches]
    return np.concatenate([np.empty((0, one.sids.chunks), np.int64), *parts])


def encode(
    bundle: EncoderBundle, spec: SidSpec, batch: SignalBatch, block_rows: int = BLOCK_ROWS
) -> npt.NDArray[np.int64]:
    """Give the SIDs of a batch, block by block, so that each is the same in any batch.

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


def _write_events_and_others(run: StageRun[MaterializeConfig], work: Work) -> None:
    """Write this rank's share of the other files; each is written by one rank alone."""
    dataset = work.dataset
    sets = [(one.spec, one.sids.opened()) for one in work.sets]

    def check(table: pa.Table, group: RowGroup) -> None:
        require_columns(table.schema, ("item_id", "history_item_ids", "user_id"), group)
        check_events(table, dataset.spec, group)

    def with_sids(table: pa.Table, group: RowGroup) -> pa.Table:
        return _with_event_columns(table, sets, group)

    def rewriting(path: Path, groups: list[RowGroup]) -> Callable[[], None]:
        segment = Segment(path, tuple(groups), work.out / path.relative_to(dataset.path))
        return lambda: _rewrite(segment, check, with_sids)

    jobs = [rewriting(path, groups) for path, groups in _by_file(dataset.all_event_files())]
    jobs += [_copying(work, path) for path in _other_files(work)]
    own = jobs[run.world.rank :: run.world.size]
    with run.log.progress(len(own), "materialize: files written") as advance:
        for job in own:
            job()
            advance(1)


def _by_file(paths: tuple[Path, ...]) -> list[tuple[Path, list[RowGroup]]]:
    groups = itertools.groupby(row_groups(paths), key=lambda group: group.path)
    found = {path: list(of_path) for path, of_path in groups}
    return [(path, found.get(path, [])) for path in paths]


def _rewrite(segment: Segment, check: Check, extend: Extend) -> None:
    """Write a segment's rows again, with the columns that `extend` appends.

    The next row group is read and checked, and the last one written, while one is extended.
    """
    with contextlib.ExitStack() as stack:
        write: WriteBehind | None = None
        for table, group in prefetched(_checked(segment, check), depth=1):
            extended = extend(table, group)
            if write is None:
                writer = stack.enter_context(TableWriter(segment.target, extended.schema))
                write = stack.enter_context(WriteBehind(writer.write))
            write(extended)


def _checked(segment: Segment, check: Check) -> Iterator[tuple[pa.Table, RowGroup]]:
    """Give a segment's row groups one by one; a file without any (a day without events) as one empty part."""
    for group in segment.groups:
        table = read_row_group(group)
        check(table, group)
        yield table, group
    if not segment.groups:
        with open_parquet(segment.source) as file:
            yield file.schema_arrow.empty_table(), RowGroup(segment.source, 0, 0, 0)


def _other_files(work: Work) -> list[Path]:
    """Give what is carried along unchanged: users without SIDs, and any folder beside the tables (vocabularies)."""
    written = ("events", *(f"{entity}s" for entity in work.entities))
    folders = sorted(path for path in work.dataset.path.iterdir() if path.is_dir() and path.name not in written)
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def _copying(work: Work, path: Path) -> Callable[[], None]:
    target = work.out / path.relative_to(work.dataset.path)

    def copy() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    return copy


def _with_event_columns(
    table: pa.Table, sets: Sequence[tuple[SidSpec, npt.NDArray[np.int64]]], group: RowGroup
) -> pa.Table:
    """Append the SIDs of the advertised item and the history, or of the user, whole and by prefix, set after set."""
    ids_B = {"item": table["item_id"].to_numpy(), "user": table["user_id"].to_numpy()}
    history = table["history_item_ids"].combine_chunks()
    history_ids_T = history.flatten().to_numpy()
    offsets_B1 = np.concatenate([[0], np.cumsum(history.value_lengths().to_numpy())]).astype(np.int32)
    for spec, ids_NC in sets:
        table = _with_prefixes(table, spec.event_base, spec, ids_NC[ids_B[spec.entity]], group, None)
        if spec.entity == "item":
            table = _with_prefixes(table, spec.event_history_base, spec, ids_NC[history_ids_T], group, offsets_B1)
    return table


def _with_prefixes(
    table: pa.Table,
    base: str,
    spec: SidSpec,
    sids_NC: npt.NDArray[np.int64],
    group: RowGroup,
    offsets: npt.NDArray[np.int32] | None,
) -> pa.Table:
    """Append the columns of whole SIDs and of their prefixes."""
    table = _with_columns(table, base, spec, sids_NC, group, offsets)
    for length in spec.prefix_lengths:
        if length < spec.digits:
            cut_NC = shortened(spec, sids_NC, length)
            table = _with_columns(table, base, spec.of_prefix(length), cut_NC, group, offsets)
    return table


def shortened(spec: SidSpec, ids_NC: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Cut SIDs to a prefix, `NULL` staying `NULL`: int64 [N, chunks of the prefix]."""
    null_N = ids_NC[:, 0] == NULL
    cut_NC = spec.cut(torch.from_numpy(np.where(null_N[:, None], 0, ids_NC)), length).numpy()
    cut_NC[null_N] = NULL
    return cut_NC


def _with_columns(
    table: pa.Table,
    base: str,
    spec: SidSpec,
    ids_NC: npt.NDArray[np.int64],
    group: RowGroup,
    offsets: npt.NDArray[np.int32] | None = None,
) -> pa.Table:
    """Append one column a chunk, as values, or as lists where offsets are given."""
    for chunk, (name, column_spec) in enumerate(sid_columns(base, spec).items()):
        if name in table.column_names:
            raise DataError(f"{group}: has a column {name!r} already; materialize a dataset without SIDs")
        ids_N = np.ascontiguousarray(ids_NC[:, chunk])
        column = pa.array(ids_N, mask=ids_NC[:, 0] == NULL)
        if offsets is not None:
            column = pa.ListArray.from_arrays(pa.array(offsets), column)
        table = table.append_column(with_sid_metadata(pa.field(name, column.type), column_spec), column)
    return table


def _close(run: StageRun[MaterializeConfig], work: Work, started: float, encoded: float) -> None:
    """Write what is not a table, take the maps away, and sum up."""
    written = time.monotonic()
    write_spec(work.out, work.dataset.spec)
    for one in work.sets:
        write_codebook(work.out, one.spec, one.bundle.model.quantizer.codewords().detach())
    found = {one.spec.name: _summary(one) for one in work.sets}
    shutil.rmtree(work.sets[0].sids.path.parent)
    run.facts["fingerprints"] = {one.spec.name: one.spec.fingerprint for one in work.sets}
    run.log.summary(
        {
            **{f"{entity}s": work.dataset.spec.content(entity).rows for entity in work.entities},
            "sids": found,
            "encoding_seconds": encoded - started,
            "items_per_second": work.dataset.spec.num_items / (encoded - started),
            "writing_seconds": written - encoded,
            "seconds": time.monotonic() - started,
        }
    )
    for one in work.sets:
        of_set = found[one.spec.name]
        run.log.say(
            f"materialize: {one.spec.name}: {one.sids.rows:,} {one.spec.entity}s, {of_set['distinct']:,} different SIDs"
            f" ({of_set['unique_share']:.1%}), {of_set['null']:,} null"
        )


def _summary(one: SidSet) -> dict[str, Any]:
    nulls, distinct = one.sids.count()
    share = distinct / max(one.sids.rows - nulls, 1)
    return {"null": nulls, "distinct": distinct, "unique_share": share, "spec": one.spec.model_dump(mode="json")}


if __name__ == "__main__":
    run_stage("materialize", "materialize", MaterializeConfig, ["dataset", f"{ENCODER_INPUT}*"], materialize)
