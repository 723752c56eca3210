"""Stage `materialize`: encode every item, and write the tables again with SID columns.

Items are encoded in shards over all ranks into one map on disk; then every rank rewrites its own
files, row group by row group. Memory is one row group and what the page cache gives the map.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from encoder.bundle import EncoderBundle, load_bundle
from encoder.config import MaterializeConfig
from encoder.sid import (
    EVENT_HISTORY_BASE,
    EVENT_ITEM_BASE,
    ITEM_BASE,
    SidSpec,
    sid_columns,
    with_sid_metadata,
)
from encoder.sid_map import NULL, SidMap
from encoder.signals import SignalBatch, signal_batch, signal_check
from infra.config import parse
from infra.distributed import together
from infra.errors import DataError
from infra.parquet import RowGroup, TableWriter, open_parquet, read_row_group, row_groups
from infra.stage import StageRun, run_stage
from infra.tables import Dataset, check_events, check_items, read_dataset, write_spec

BLOCK_ROWS = 256
"""Rows that pass through the network at a time, always.

A matrix product may add up in another order for another number of rows or threads, and a last bit
decides a code that lies on a border. So a row is always encoded in a block of this many rows, at
the place in it that its row group gives it, by one thread: its id then depends on nothing else,
not on the batch size, nor on the number of ranks. More speed comes from more ranks.
"""


@dataclass(frozen=True)
class Work:
    """What all parts of the stage share."""

    dataset: Dataset
    bundle: EncoderBundle
    spec: SidSpec
    sids: SidMap
    out: Path


def materialize(run: StageRun[MaterializeConfig]) -> None:
    """Write the dataset again, with SID columns, into `run.out`.

    Raises:
        ConfigError: a prefix does not fit the encoder's digits.
        DataError: a row breaks the tables' contract, or the dataset is not what the encoder takes.
        SpecError: the encoder's weights are not those of its fingerprint.
    """
    world, started = run.world, time.monotonic()
    with together(world, "opening dataset and encoder"):
        work = _opened(run)
        if world.is_main:
            work.sids.create()
    _encode_items(run, work)
    encoded = time.monotonic()
    with together(world, "writing the tables"):
        _write_tables(run, work)
    with together(world, "closing the tables"):
        if world.is_main:
            _close(run, work, encoded - started, time.monotonic() - encoded)


def _opened(run: StageRun[MaterializeConfig]) -> Work:
    dataset = read_dataset(run.inputs["dataset"])
    bundle = load_bundle(run.inputs["encoder"], run.world.device)
    bundle.signals.require(dataset.spec, dataset.path)
    chosen = {"prefix_lengths": run.config.prefix_lengths, "packing": run.config.packing}
    spec = parse(SidSpec, {**bundle.spec.model_dump(), **chosen}, "materialize")
    rows = sum(group.rows for group in row_groups(dataset.item_files))
    if rows != dataset.spec.num_items:
        raise DataError(f"{dataset.path}/items: has {rows} rows, dataset.json says {dataset.spec.num_items}")
    sids = SidMap(run.out / "sid-map" / "items.int64", rows, len(spec.chunk_sizes))
    return Work(dataset, bundle, spec, sids, run.out)


def _encode_items(run: StageRun[MaterializeConfig], work: Work) -> None:
    """Encode this rank's row groups of the items into the map."""
    world, check = run.world, signal_check(work.dataset.spec)
    groups = row_groups(work.dataset.item_files)[world.rank :: world.size]
    batch_rows = -(-run.config.batch_size // BLOCK_ROWS) * BLOCK_ROWS  # whole blocks: see BLOCK_ROWS
    with (
        together(world, "encoding the items"),
        run.log.progress(sum(group.rows for group in groups), "materialize: items encoded") as advance,
    ):
        for group in groups:
            table = read_row_group(group, work.bundle.signals.columns)
            check(table, group)
            for start in range(0, table.num_rows, batch_rows):
                batch = signal_batch(table.slice(start, batch_rows), work.bundle.signals)
                work.sids.write(group.start + start, encode(work.bundle, work.spec, batch))
                advance(len(batch))


def encode(bundle: EncoderBundle, spec: SidSpec, batch: SignalBatch) -> npt.NDArray[np.int64]:
    """Give the SIDs of a batch, block by block, so that each is the same in any batch.

    Args:
        bundle: the encoder.
        spec: how digits become ids; its digits are the bundle's.
        batch: the items' signals, beginning at a block's border.

    Returns:
        int64 [N, chunks]; `NULL` where every signal is missing.
    """
    parts = []
    with torch.inference_mode(), _one_thread():
        for block in batch.blocks(BLOCK_ROWS):
            on_device = block.padded(BLOCK_ROWS).to(bundle.model.weights_K.device)
            ids_NC = spec.pack(bundle.model.digits(on_device)[: len(block)]).cpu()
            ids_NC[~block.any_present] = NULL
            parts.append(ids_NC)
    return torch.cat(parts).numpy()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_tables(run: StageRun[MaterializeConfig], work: Work) -> None:
    """Write this rank's files; a file is written by one rank alone, so its bytes are the same for any number."""
    dataset, ids_NC = work.dataset, work.sids.opened()

    def with_item_sids(table: pa.Table, group: RowGroup) -> pa.Table:
        check_items(table, dataset.spec, group)
        return _with_columns(table, ITEM_BASE, work.spec, ids_NC[group.start : group.start + group.rows], group)

    def with_event_sids(table: pa.Table, group: RowGroup) -> pa.Table:
        check_events(table, dataset.spec, group)
        return _event_columns(table, work.spec, ids_NC, group)

    jobs: list[Callable[[], None]] = []
    jobs += [_rewriting(work, groups, with_item_sids) for groups in _by_file(dataset.item_files)]
    jobs += [_rewriting(work, groups, with_event_sids) for groups in _by_file(dataset.all_event_files())]
    jobs += [_copying(work, path) for path in _other_files(dataset)]
    own = jobs[run.world.rank :: run.world.size]
    with run.log.progress(len(own), "materialize: files written") as advance:
        for job in own:
            job()
            advance(1)


def _by_file(paths: tuple[Path, ...]) -> list[tuple[Path, list[RowGroup]]]:
    groups = row_groups(paths)
    return [(path, [group for group in groups if group.path == path]) for path in paths]


def _rewriting(
    work: Work, file: tuple[Path, list[RowGroup]], extend: Callable[[pa.Table, RowGroup], pa.Table]
) -> Callable[[], None]:
    path, groups = file
    target = work.out / path.relative_to(work.dataset.path)

    def rewrite() -> None:
        tables = (extend(table, group) for table, group in _parts(path, groups))
        first = next(tables)
        with TableWriter(target, first.schema) as writer:
            writer.write(first)
            for table in tables:
                writer.write(table)

    return rewrite


def _parts(path: Path, groups: list[RowGroup]) -> Iterator[tuple[pa.Table, RowGroup]]:
    """Give a file's row groups one by one; a file without any (a day without events) as one empty part."""
    for group in groups:
        yield read_row_group(group), group
    if not groups:
        with open_parquet(path) as file:
            yield file.schema_arrow.empty_table(), RowGroup(path, 0, 0, 0)


def _other_files(dataset: Dataset) -> list[Path]:
    """Give what is carried along unchanged: users, and any folder beside the tables (vocabularies)."""
    folders = sorted(path for path in dataset.path.iterdir() if path.is_dir() and path.name not in ("items", "events"))
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def _copying(work: Work, path: Path) -> Callable[[], None]:
    target = work.out / path.relative_to(work.dataset.path)

    def copy() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    return copy


def _event_columns(table: pa.Table, spec: SidSpec, ids_NC: npt.NDArray[np.int64], group: RowGroup) -> pa.Table:
    """Append the SIDs of the advertised item and of the history, whole and by prefix."""
    items_NC = ids_NC[table["item_id"].to_numpy()]
    history = table["history_item_ids"].combine_chunks()
    lengths = history.value_lengths().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    histories_NC = ids_NC[history.flatten().to_numpy()]
    for base, sids_NC, ends in ((EVENT_ITEM_BASE, items_NC, None), (EVENT_HISTORY_BASE, histories_NC, offsets)):
        table = _with_columns(table, base, spec, sids_NC, group, ends)
        for length in spec.prefix_lengths:
            if length < spec.digits:
                cut_NC = shortened(spec, sids_NC, length)
                table = _with_columns(table, base, spec.of_prefix(length), cut_NC, group, ends)
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


def _close(run: StageRun[MaterializeConfig], work: Work, encoding_s: float, writing_s: float) -> None:
    """Write what is not a table, take the map away, and sum up."""
    nulls, distinct = work.sids.count()
    shutil.rmtree(work.sids.path.parent)
    write_spec(work.out, work.dataset.spec)
    items = work.sids.num_items
    unique_share = distinct / max(items - nulls, 1)
    run.facts["fingerprint"] = work.spec.fingerprint
    run.log.summary(
        {
            "items": items,
            "null_sids": nulls,
            "distinct_sids": distinct,
            "unique_share": unique_share,
            "encoding_seconds": encoding_s,
            "items_per_second": items / encoding_s,
            "writing_seconds": writing_s,
            "sid_spec": work.spec.model_dump(mode="json"),
        }
    )
    run.log.say(f"materialize: {items:,} items, {distinct:,} different SIDs ({unique_share:.1%}), {nulls:,} null")


if __name__ == "__main__":
    run_stage("materialize", "materialize", MaterializeConfig, ["dataset", "encoder"], materialize)
