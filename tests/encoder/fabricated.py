"""A small dataset of the tables' contract, with missing signals, and stages run on it."""

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from encoder.config import EncoderConfig, MaterializeConfig
from encoder.materialize import materialize
from encoder.train import train
from infra.checkpoint import Checkpoints
from infra.commit import committing
from infra.config import parse, plain
from infra.distributed import World
from infra.parquet import TableWriter
from infra.stage import StageRun
from infra.tables import DatasetSpec, TaskSpec, event_schema, item_schema, user_schema, write_spec
from infra.tracking import RunLog

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
"""Users without any."""

ENCODER: dict[str, Any] = {
    "network": {"embedding_width": 16, "categorical_width": 8, "hidden": 32, "blocks": 1},
    "quantizer": {"kind": "structured", "groups": 2, "depth": 3, "group_dim": 4},
    "training": {"epochs": 2, "batch_size": 64, "lanes": 4, "learning_rate": 0.003, "log_every": 5},
}
MATERIALIZE: dict[str, Any] = {"prefix_lengths": {"sid": [2, 4, 6]}, "batch_size": 128}

LOCAL = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), backend="gloo")


def write_dataset(path: Path, row_group_rows: int = 90) -> Path:
    """Write items in two files, users, and two days of events; the same bytes every time."""
    write_table(path / "users/part-00000.parquet", users(), row_group_rows)
    items = item_table()
    write_table(path / "items/part-00000.parquet", items.slice(0, 400), row_group_rows)
    write_table(path / "items/part-00001.parquet", items.slice(400), row_group_rows)
    for day in (SPEC.train[0], SPEC.test[0]):
        write_table(path / f"events/date={day}/part-00000.parquet", events(day), row_group_rows)
    (path / "vocabularies").mkdir(exist_ok=True)
    (path / "vocabularies/brand.json").write_text('["a", "b"]')
    write_spec(path, SPEC)
    return path


def write_table(path: Path, table: pa.Table, row_group_rows: int) -> None:
    with TableWriter(path, table.schema, row_group_rows=row_group_rows) as writer:
        writer.write(table)


def users() -> pa.Table:
    rng = np.random.default_rng(1)
    ids = np.arange(SPEC.num_users)
    bare = np.isin(ids, BARE_USERS)
    ages = pa.array(rng.integers(0, 6, len(ids)), pa.int32(), mask=bare)
    activity = embedding_column(rng.standard_normal((len(ids), 8)).astype(np.float16), missing=bare)
    return pa.table([pa.array(ids), activity, ages], schema=user_schema(SPEC))


def item_table() -> pa.Table:
    """Give items whose signals share a latent cause of 6 numbers; a fifth of each but `type` is missing."""
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


def events(day: date, rows: int = 200) -> pa.Table:
    """Give a day's events; items without signals occur as the advertised one and in histories."""
    rng = np.random.default_rng(day.day)
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC).replace(tzinfo=None)
    times = [midnight + timedelta(minutes=i) for i in range(rows)]
    lengths = rng.integers(0, SPEC.max_history + 1, rows)
    histories = [rng.integers(0, SPEC.num_items, length) for length in lengths]
    item_ids = rng.integers(0, SPEC.num_items, rows)
    item_ids[3] = BARE_ITEMS[0]
    histories[4] = np.array([1, BARE_ITEMS[1], 2])
    history_times = [
        [time - timedelta(hours=len(history) - i) for i in range(len(history))]
        for time, history in zip(times, histories, strict=True)
    ]
    return pa.table(
        [
            pa.array(times),
            pa.array(rng.integers(0, SPEC.num_users, rows)),
            pa.array(item_ids),
            pa.array(rng.integers(0, 2, rows), pa.int8()),
            pa.array(np.zeros(rows), pa.int8()),
            pa.array(rng.random(rows), pa.float32()),
            pa.array([[int(i)] for i in rng.integers(0, 5, rows)], pa.list_(pa.int64())),
            pa.array(histories, pa.list_(pa.int64())),
            pa.array(history_times, pa.list_(pa.timestamp("us"))),
        ],
        schema=event_schema(SPEC),
    )


def train_encoder(
    world: World,
    dataset: Path,
    out: Path,
    changes: Mapping[str, Any] | None = None,
    log_type: type[RunLog] = RunLog,
) -> None:
    """Run the body of stage `encoder` and commit it, as its main program would."""
    config = parse(EncoderConfig, merged(ENCODER, changes or {}), "encoder")
    facts: dict[str, Any] = {}
    checkpoints = Checkpoints(out.with_name(f"{out.name}.checkpoint"), world, "encoder", {}, config)
    with committing(out, world, stage="encoder", facts=facts) as staging:
        log = log_type.open(world.rank, "encoder", staging, plain(config), {}, "", None)
        train(StageRun(config, {"dataset": dataset}, staging, world, log, facts, checkpoints))
    checkpoints.remove()


def materialize_dataset(
    world: World, dataset: Path, encoder: Path, out: Path, changes: Mapping[str, Any] | None = None, **others: Path
) -> None:
    """Run the body of stage `materialize` and commit it; `others` are further encoders by their SIDs' name."""
    config = parse(MaterializeConfig, merged(MATERIALIZE, changes or {}), "materialize")
    facts: dict[str, Any] = {}
    with committing(out, world, stage="materialize", facts=facts) as staging:
        log = RunLog.open(world.rank, "materialize", staging, plain(config), {}, "", None)
        encoders = {f"encoder.{name}": path for name, path in {"sid": encoder, **others}.items()}
        materialize(StageRun(config, {"dataset": dataset, **encoders}, staging, world, log, facts))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay changes over nested settings."""
    out = dict(base)
    for key, value in changes.items():
        deeper = isinstance(value, Mapping) and isinstance(out.get(key), Mapping) and "kind" not in value
        out[key] = merged(out[key], value) if deeper else value
    return out


def tables_of(path: Path) -> dict[str, bytes]:
    """Give the bytes of every file of the dataset, by name."""
    folders = (path / name for name in ("items", "users", "events", "vocabularies"))
    files = [file for folder in folders for file in sorted(folder.rglob("*.*")) if file.is_file()]
    files.append(path / "dataset.json")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}
