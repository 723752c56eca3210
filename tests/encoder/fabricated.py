"""Fabricate a small dataset with missing signals, and run the encoder's stages on it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sidestack.encoder.config import EncoderConfig, MaterializeConfig
from sidestack.encoder.materialize import materialize
from sidestack.encoder.train import train
from sidestack.infra.checkpoint import Checkpoints
from sidestack.infra.commit import committing
from sidestack.infra.config import parse, plain
from sidestack.infra.distributed import World
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.profile import StepProfile
from sidestack.infra.snapshot import CONTENT, Snapshot, read_dataset, write_snapshot
from sidestack.infra.stage import StageRun
from sidestack.infra.store import Store, day_entries, in_order, missing_keys, write_day
from sidestack.infra.tables import DatasetSpec, Entity, TaskSpec, daily_tables, flat_schema, item_schema, user_schema
from sidestack.infra.tracking import RunLog

SPEC = DatasetSpec(
    embeddings={"text_embedding": 16, "behaviour_embedding": 8},
    categoricals={"type": 5, "brand": 12},  # "type" is also the name of a method of torch modules
    user_categoricals={"age": 6},
    user_embeddings={"activity": 8},
    num_items=700,
    num_users=40,
    tasks={"click": TaskSpec(), "conversion": TaskSpec(given="click")},
    dense=("price",),
    sparse={"slot": 5},
    max_history=6,
    train=(date(2024, 1, 1), date(2024, 1, 1)),
    test=(date(2024, 1, 2), date(2024, 1, 2)),
    origin="fabricated for the encoder's tests",
)
BARE_ITEMS = (17, 400, 699)
"""Items without any signal: their SID is null."""
BARE_USERS = (3, 39)
"""Users without any signal."""
DAYS = (SPEC.train[0], SPEC.test[0])
GROUP_ROWS = 90
"""Rows per row group of the item table."""

ENCODER: dict[str, Any] = {
    "network": {"embedding_width": 16, "categorical_width": 8, "hidden": 32, "blocks": 1},
    "quantizer": {"kind": "structured", "groups": 2, "depth": 3, "group_dim": 4},
    "training": {"epochs": 2, "batch_size": 64, "lanes": 4, "learning_rate": 0.003, "log_every": 5},
}
MATERIALIZE: dict[str, Any] = {"prefix_lengths": {"sid": [2, 4, 6]}, "batch_size": 128}

LOCAL = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), backend="gloo")


def write_dataset(
    path: Path,
    parts: Sequence[pa.Table] | None = None,
    days: Mapping[date, pa.Table] | None = None,
    store: Path | None = None,
    row_group_rows: int = GROUP_ROWS,
) -> Path:
    """Write a snapshot with two parts of items, one of users and two days of events; the same bytes every time.

    Args:
        path: its folder. parts: of the item table; `num_items` is the sum of their new items.
        days: joined impressions by date.
        store: folder of the partition store, whose existing partitions are reused; by default one inside `path`, so
            that a test can copy and corrupt it.
        row_group_rows: items per row group.
    """
    path.mkdir(parents=True, exist_ok=True)
    kept = Store(store or path / "store")
    items = write_parts(kept, "item", item_parts() if parts is None else parts, row_group_rows)
    entries = [*items, *write_parts(kept, "user", [users()])]
    for day, rows in ({day: events(day) for day in DAYS} if days is None else days).items():
        keys = dict.fromkeys(daily_tables(SPEC), rows_digest(rows))
        write_day(kept, day, missing_keys(kept, day, keys), SPEC, [rows], row_group_bytes=6_000)
        entries += day_entries(kept, day, keys)
    spec = SPEC.model_copy(update={"num_items": sum(entry.facts["new"] for entry in items)})
    write_snapshot(path, path, spec, Snapshot(store=str(kept.path), partitions=tuple(in_order(entries))))
    return path


def write_parts(
    store: Store, entity: Entity, tables: Sequence[pa.Table], row_group_rows: int = GROUP_ROWS
) -> list[PartitionEntry]:
    """Write parts as `infra.store.write_part` does, but with small row groups, three per file."""
    name, first, entries = CONTENT[entity], 0, []
    file_rows = 3 * row_group_rows
    for number, table in enumerate(tables):
        place = (name, f"part={number:05d}", rows_digest(table))
        if store.find(*place) is None:
            with store.new_partition(*place) as made:
                made.schema = table.schema
                for file, start in enumerate(range(0, table.num_rows, file_rows)):
                    rows = table.slice(start, file_rows)
                    write_table(made.path / f"part-{file:05d}.parquet", rows, row_group_rows)
                new = int((table.column(0).to_numpy() >= first).sum())
                made.numbers |= {"first": first, "new": new}
        entries.append(store.entry(*place))
        first += entries[-1].facts["new"]
    return entries


def rows_digest(table: pa.Table) -> str:
    return hashlib.sha256(repr([table.schema.types, table.to_pydict()]).encode()).hexdigest()


def write_table(path: Path, table: pa.Table, row_group_rows: int = GROUP_ROWS) -> None:
    with TableWriter(path, table.schema, row_group_rows=row_group_rows) as writer:
        writer.write(table)


def edit(path: Path, table: str, change: Callable[[pa.Table], pa.Table], only: str = "") -> list[Path]:
    """Replace a table's partitions by partitions with changed rows, and return the new files.

    Args:
        path: the snapshot. table: the table. change: maps the rows of a partition to the new rows.
        only: the only slice to change; by default all.
    """
    dataset = read_dataset(path)
    store = Store(dataset.store)
    changed: dict[str, PartitionEntry] = {}
    for entry in dataset.partitions(table):
        if only in ("", entry.slice):
            groups = row_groups([store.path / entry.path / file.name for file in entry.files])
            rows = change(pa.concat_tables([read_row_group(group) for group in groups]))
            with store.new_partition(table, entry.slice, rows_digest(rows)) as made:
                made.schema = rows.schema
                made.numbers |= entry.facts
                for file in entry.files:
                    with TableWriter(made.path / file.name, rows.schema) as writer:
                        for group in groups:
                            if group.path.name == file.name:
                                writer.write_group(rows.slice(group.start, group.rows))
            edited = store.entry(table, entry.slice, rows_digest(rows))
            changed[entry.slice] = edited.model_copy(update={"columns": entry.columns})
    others = [entry for entry in dataset.snapshot.partitions if entry.table != table or entry.slice not in changed]
    partitions = tuple(in_order([*others, *changed.values()]))
    listed = {**dict(dataset.snapshot), "store": str(store.path), "partitions": partitions}
    write_snapshot(path, path, dataset.spec, Snapshot(**listed))
    return [store.path / entry.path / file.name for entry in changed.values() for file in entry.files]


def replaced(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    """Return the table with one column replaced; the new column may have another type."""
    at = table.column_names.index(name)
    return table.set_column(at, pa.field(name, column.type, table.schema.field(at).nullable), column)


def users() -> pa.Table:
    rng = np.random.default_rng(1)
    ids = np.arange(SPEC.num_users)
    bare = np.isin(ids, BARE_USERS)
    ages = pa.array(rng.integers(0, 6, len(ids)), pa.int32(), mask=bare)
    activity = embedding_column(rng.standard_normal((len(ids), 8)).astype(np.float16), missing=bare)
    return pa.table([pa.array(ids), activity, ages], schema=user_schema(SPEC))


def item_table() -> pa.Table:
    """Return items whose signals share a latent cause of 6 numbers; a fifth of each signal but `type` is missing."""
    rng = np.random.default_rng(0)
    num = SPEC.num_items
    cause_NC = rng.standard_normal((num, 6))
    bare_N = np.isin(np.arange(num), BARE_ITEMS)
    columns: list[pa.Array] = [pa.array(np.arange(num)), pa.array([f"item {i}" for i in range(num)])]
    for dim in SPEC.embeddings.values():
        x_ND = cause_NC @ rng.standard_normal((6, dim)) + 0.2 * rng.standard_normal((num, dim))
        columns.append(embedding_column(x_ND.astype(np.float16), missing=bare_N | (rng.random(num) < 0.2)))
    for c, (name, cardinality) in enumerate(SPEC.categoricals.items()):
        ids_N = np.digitize(cause_NC[:, c], np.linspace(-1.5, 1.5, cardinality - 1))
        missing = bare_N | (rng.random(num) < (0.0 if name == "type" else 0.2))
        columns.append(pa.array(ids_N, pa.int32(), mask=missing))
    return pa.table(columns, schema=item_schema(SPEC))


def embedding_column(x_ND: np.ndarray, missing: np.ndarray) -> pa.Array:
    rows = [None if gone else row for row, gone in zip(x_ND, missing, strict=True)]
    return pa.array(rows, pa.list_(pa.from_numpy_dtype(x_ND.dtype), x_ND.shape[1]))


def item_parts(table: pa.Table | None = None) -> list[pa.Table]:
    """Return the items cut into two parts."""
    items = item_table() if table is None else table
    return [items.slice(0, 400), items.slice(400)]


def events(day: date, rows: int = 200) -> pa.Table:
    """Return a day's joined impressions, two per request; items without signals are shown and occur in histories."""
    rng = np.random.default_rng(day.day)
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC).replace(tzinfo=None)
    requests = rows // 2
    times = [midnight + timedelta(minutes=i) for i in range(requests)]
    lengths = rng.integers(0, SPEC.max_history + 1, requests)
    histories = [rng.integers(0, SPEC.num_items, length) for length in lengths]
    item_ids = rng.integers(0, SPEC.num_items, rows)
    item_ids[3] = BARE_ITEMS[0]
    histories[4] = np.array([1, BARE_ITEMS[1], 2])
    history_times = [
        [time - timedelta(hours=len(history) - i) for i in range(len(history))]
        for time, history in zip(times, histories, strict=True)
    ]
    of_request = pa.table(
        {
            "request_id": pa.array((day.toordinal() << 32) + np.arange(requests)),
            "user_id": pa.array(rng.integers(0, SPEC.num_users, requests)),
            "event_time": pa.array(times, pa.timestamp("us")),
            "history_item_ids": pa.array(histories, pa.list_(pa.int64())),
            "history_times": pa.array(history_times, pa.list_(pa.timestamp("us"))),
        }
    ).take(pa.array(np.repeat(np.arange(requests), 2)))
    of_impression = {
        "item_id": pa.array(item_ids),
        "price": pa.array(rng.random(rows), pa.float32()),
        "slot": pa.array([[int(i)] for i in rng.integers(0, 5, rows)], pa.list_(pa.int64())),
        "click": pa.array(rng.integers(0, 2, rows), pa.int8()),
        "conversion": pa.array(np.zeros(rows), pa.int8()),
    }
    for name, column in of_impression.items():
        of_request = of_request.append_column(name, column)
    schema = flat_schema(SPEC)
    return of_request.select(schema.names).cast(schema)


def train_encoder(
    world: World,
    dataset: Path,
    out: Path,
    changes: Mapping[str, Any] | None = None,
    log_type: type[RunLog] = RunLog,
    start: Path | None = None,
    profile: int = 0,
) -> None:
    """Run the body of stage `encoder` and commit its output, as its main program does."""
    config = parse(EncoderConfig, merged(ENCODER, changes or {}), "encoder")
    facts: dict[str, Any] = {}
    checkpoints = Checkpoints(out.with_name(f"{out.name}.checkpoint"), world, "encoder", {}, config)
    with committing(out, world, stage="encoder", facts=facts) as staging:
        log = log_type.open(world.rank, "encoder", staging, plain(config), {}, "", None)
        inputs = {"dataset": dataset} if start is None else {"dataset": dataset, "start": start}
        traced = StepProfile(profile, out.with_name(f"{out.name}.profile"), world.rank, log.info)
        train(StageRun(config, inputs, staging, world, log, facts, checkpoints, profile=traced))
        facts.update(checkpoints.facts)
    checkpoints.remove()


def materialize_dataset(
    world: World,
    dataset: Path,
    encoders: Path | Mapping[str, Path],
    out: Path,
    changes: Mapping[str, Any] | None = None,
    published: Path | None = None,
) -> None:
    """Run the body of stage `materialize` and commit its output.

    Args:
        encoders: one bundle, or several keyed by SID name. published: an earlier output of the stage.
    """
    config = parse(MaterializeConfig, merged(MATERIALIZE, changes or {}), "materialize")
    facts: dict[str, Any] = {}
    paths = {"sid": encoders} if isinstance(encoders, Path) else encoders
    with committing(out, world, stage="materialize", facts=facts) as staging:
        log = RunLog.open(world.rank, "materialize", staging, plain(config), {}, "", None)
        inputs = {"dataset": dataset, **{f"encoder.{name}": path for name, path in paths.items()}}
        inputs |= {} if published is None else {"published": published}
        materialize(StageRun(config, inputs, staging, world, log, facts))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with changes merged in; a mapping with a `kind` replaces the earlier one."""
    out = dict(base)
    for key, value in changes.items():
        deeper = isinstance(value, Mapping) and isinstance(out.get(key), Mapping) and "kind" not in value
        out[key] = merged(out[key], value) if deeper else value
    return out
