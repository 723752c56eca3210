"""Fabricated outputs of the stages before `compare`: seeded, small, and in the real layout."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from sidestack.infra.commit import committing
from sidestack.infra.config import plain, to_yaml
from sidestack.infra.distributed import World
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.tables import DatasetSpec, TaskSpec, flat_schema
from sidestack.ranker.config import ArmConfig, RankerConfig, TrainingConfig
from tests.datasets import write_snapshot_of

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), backend="gloo")
ARMS = {"none": 0.9, "sid_ngram": 0.75, "side": 0.45}
"""Arm -> standard deviation of the noise on its logits: less is better."""

SPEC = DatasetSpec(
    embeddings={"text_embedding": 4},
    categoricals={"brand": 3},
    user_categoricals={},
    num_items=50,
    num_users=400,
    tasks={"click": TaskSpec(), "conversion": TaskSpec(given="click")},
    dense=(),
    sparse={},
    max_history=5,
    train=(date(2017, 9, 10), date(2017, 11, 11)),
    test=(date(2017, 11, 12), date(2017, 12, 9)),
    origin="fabricated for tests",
)

SUMMARY = {
    "dates": {
        "train": [day.isoformat() for day in SPEC.train],
        "held_out": [day.isoformat() for day in SPEC.test],
    },
    "table_bytes": 12_690_000,
    "samples_per_second": 12_345.6,
    "train_seconds": 61.2,
    "peak_memory_bytes": 1_300_000_000,
    "parameters": 3_200_000,
    "flops_per_sample": 251_000.0,
    "world_size": 2,
    "steps": 3000,
}
KINDS = ("sid_ngram", "side")
SID_TABLE_BYTES = {"none": 0, "sid_ngram": 100_663_296, "side": 0}
FEATURE_BYTES = {"none": 0.0, "sid_ngram": 1224.0, "side": 408.0}


def committed(
    path: Path, stage: str, write: Callable[[Path], object], inputs: Mapping[str, str] | None = None, **facts: Any
) -> Path:
    """Commit what `write` puts into a directory."""
    with committing(path, WORLD, stage=stage, inputs=inputs, facts=facts) as staging:
        write(staging)
    return path


def truth(rows: int = 4000, users: int = 400, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Draw impressions: ids, the true logits, and labels; a conversion without a label is -1."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, rows)
    logit = rng.normal(-2.0, 1.0, rows) + rng.normal(0, 0.7, users)[user]
    click = rng.random(rows) < 1 / (1 + np.exp(-logit))
    conversion = click & (rng.random(rows) < converted(logit))
    return {
        "user_id": user,
        "item_id": rng.integers(0, 50, rows),
        "logit": logit,
        "click": click.astype(np.int8),
        "conversion": np.where(click & (rng.random(rows) > 0.1), conversion, -1).astype(np.int8),
    }


def converted(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the chance of a conversion, given a click whose chance has this logit."""
    chance: NDArray[np.float64] = 1 / (1 + np.exp(-1.5 - 1.5 * logit))
    return chance


def predictions(drawn: Mapping[str, NDArray[Any]], noise: float, seed: int) -> pa.Table:
    """Return the predictions of an arm that knows the true logits up to noise."""
    rng = np.random.default_rng([seed, 7])
    rows = len(drawn["logit"])
    logit = drawn["logit"] + rng.normal(0, noise, rows)
    start = datetime(2017, 11, 12)
    return pa.table({
        "row": pa.array(np.arange(rows), pa.int64()),
        "user_id": pa.array(drawn["user_id"], pa.int64()),
        "item_id": pa.array(drawn["item_id"], pa.int64()),
        "event_time": pa.array([start + timedelta(minutes=i) for i in range(rows)], pa.timestamp("us")),
        "click": pa.array(drawn["click"], pa.int8()),
        "conversion": pa.array(drawn["conversion"], pa.int8(), mask=drawn["conversion"] < 0),
        "p_click": pa.array(1 / (1 + np.exp(-logit)), pa.float32()),
        "p_conversion": pa.array(converted(logit), pa.float32()),
    })  # fmt: skip


def ranker_output(
    path: Path,
    arm: str,
    table: pa.Table,
    *,
    ranks: int = 2,
    summary: Mapping[str, Any] | None = None,
    dataset: str = "",
    config: str = "",
    section: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Commit a ranker's output whose ranks have interleaved rows, as the lane reader distributes them."""
    values = {
        "arm": arm, **SUMMARY,
        "sid_table_bytes": SID_TABLE_BYTES.get(arm, 0),
        "feature_bytes_per_row": FEATURE_BYTES.get(arm, 0.0), **(summary or {}),
    }  # fmt: skip

    def write(staging: Path) -> None:
        owner = np.arange(table.num_rows) // 16 % max(ranks, 1)
        for rank in range(ranks):
            file = staging / "predictions" / f"part-{rank:05d}.parquet"
            with TableWriter(file, table.schema, row_group_rows=512) as writer:
                writer.write(table.filter(pa.array(owner == rank)))
        (staging / "summary.json").write_text(json.dumps(values))
        (staging / "config.yaml").write_text(to_yaml({"ranker": section or ranker_section(arm)}))
        tasks = [name.removeprefix("p_") for name in table.column_names if name.startswith("p_")]
        lines = _history(arm, tasks) if history is None else history
        (staging / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return committed(path, "ranker", write, {"dataset": dataset} if dataset else None, config=config or path.name)


def ranker_section(arm: str, replicate: int = 0) -> dict[str, Any]:
    """Return an arm's resolved section, with the content of the arm's name for item and history."""
    overlay = {"training": {"sparse_learning_rate": 0.025}} if arm == "side" else {}
    content = {"item": arm, "history": arm, "overlay": overlay}
    arms = {arm: ArmConfig.model_validate(content) if arm in KINDS else ArmConfig()}
    training = TrainingConfig(epochs=1, batch_size=1024, sparse_learning_rate=0.05, dense_learning_rate=0.001)
    values = plain(RankerConfig(arm=arm, arms=arms, training=training).resolved())
    values["training"]["seed"] += replicate
    return values


def _history(arm: str, tasks: Sequence[str]) -> list[dict[str, float]]:
    rng = np.random.default_rng(len(arm))
    floor = 0.55 + 0.15 * ARMS.get(arm, 0.6)
    lines: list[dict[str, float]] = []
    for step in range(50, 3050, 50):
        noisy = floor + 0.5 * np.exp(-step / 300) + rng.normal(0, 0.006)
        values = {"step": step, **{f"train_{task}_ne": noisy + 0.2 * place for place, task in enumerate(tasks)}}
        lines.append(values)
    return lines


def training_events(day: int, task: str = "click") -> pa.Table:
    """Draw a training date's rows with the columns that a comparison reads; low ids are frequent, high ids absent."""
    rng = np.random.default_rng([day, 5])
    user = (rng.random(1500) ** 2 * 300).astype(np.int64)
    item = (rng.random(1500) ** 3 * 45).astype(np.int64)
    return pa.table({"user_id": user, "item_id": item, task: (rng.random(1500) < 0.2).astype(np.int8)})


def dataset_output(path: Path, tasks: Mapping[str, TaskSpec] = SPEC.tasks) -> Path:
    """Commit a snapshot of two training dates and a test date, which a comparison must not read.

    Its events have labels only of the first task without a parent: a comparison reads no others.
    """
    root = next((name for name, task in tasks.items() if task.given is None), "")
    spec = SPEC.model_copy(update={"tasks": dict(tasks)})
    dates = (SPEC.train[0], SPEC.train[1], SPEC.test[0])
    days = {date_: _joined(training_events(day, root), date_, spec) for day, date_ in enumerate(dates)}

    def write(staging: Path) -> None:
        write_snapshot_of(staging, spec, days=days, row_group_rows=400)
        (staging / "config.yaml").write_text("materialize:\n  prefix_lengths: {sid: [5]}\n")
        counts = {"rows": 50, "null": 2, "distinct": 24, "unique_share": 0.5}
        (staging / "summary.json").write_text(json.dumps({"sids": {"sid": counts}}))

    return committed(path, "materialize", write, config="m")


def _joined(rows: pa.Table, day: date, spec: DatasetSpec) -> pa.Table:
    """Return rows with all columns of the contract: at noon, with empty histories and null for unknown labels."""
    number = rows.num_rows
    columns = {
        "event_time": pa.array([datetime(day.year, day.month, day.day, 12)] * number, pa.timestamp("us")),
        "history_item_ids": pa.array([[]] * number, pa.list_(pa.int64())),
        "history_times": pa.array([[]] * number, pa.list_(pa.timestamp("us"))),
        **{task: pa.nulls(number, pa.int8()) for task in spec.tasks},
        **{name: rows[name] for name in rows.column_names},
    }
    return pa.table({name: columns[name] for name in flat_schema(spec).names if name in columns})


def all_inputs(root: Path, rows: int = 4000, replicates: int = 1) -> dict[str, Path]:
    """Commit all inputs of a comparison."""
    drawn = truth(rows)
    found = {}
    for place, (arm, noise) in enumerate(ARMS.items()):
        for replicate in range(replicates):
            table = predictions(drawn, noise, place + 10 * replicate)
            path, section = root / f"ranker-{arm}.{replicate}", ranker_section(arm, replicate)
            found[f"arm.{arm}.{replicate}"] = ranker_output(path, arm, table, section=section)
    return {**found, **other_inputs(root)}


def other_inputs(root: Path, tasks: Mapping[str, TaskSpec] = SPEC.tasks) -> dict[str, Path]:
    """Commit the inputs of a comparison other than the arms."""
    return {
        "encoder.sid": encoder_output(root / "encoder"),
        "prepare": prepare_output(root / "prepare"),
        "dataset": dataset_output(root / "dataset", tasks),
    }


def prepare_output(path: Path) -> Path:
    """Commit the part of prepare's output that a comparison reads: its section."""

    def write(staging: Path) -> None:
        section = {"source": {"kind": "synthetic", "num_items": 50}, "as_of": None, "cache_dir": ".cache"}
        (staging / "config.yaml").write_text(to_yaml({"prepare": section}))

    return committed(path, "prepare", write, config="p")


def inputs_of_tasks(root: Path, tasks: Mapping[str, TaskSpec], rows: int = 4000) -> dict[str, Path]:
    """Commit all inputs of a comparison with other tasks; see `table_of_tasks`."""
    found = {}
    for place, (arm, noise) in enumerate(ARMS.items()):
        table = table_of_tasks(tasks, noise, place, rows)
        found[f"arm.{arm}.0"] = ranker_output(root / f"ranker-{arm}.0", arm, table)
    return {**found, **other_inputs(root, tasks)}


def table_of_tasks(tasks: Mapping[str, TaskSpec], noise: float, seed: int, rows: int = 4000) -> pa.Table:
    """Draw predictions; a task with a parent has labels where the parent's label is 1, and rows of item 0 have none."""
    shared, own = np.random.default_rng(1), np.random.default_rng([seed, 9])
    user, item = shared.integers(0, 400, rows), shared.integers(0, 50, rows)
    logit = shared.normal(-0.5, 1.0, rows) + shared.normal(0, 0.7, 400)[user]
    columns: dict[str, Any] = {"row": np.arange(rows), "user_id": user, "item_id": item}
    labels: dict[str | None, NDArray[Any]] = {None: np.where(item > 0, 1, 0)}
    for name in sorted(tasks, key=lambda name: tasks[name].given is not None):
        judged = labels[tasks[name].given] == 1
        labels[name] = np.where(judged, shared.random(rows) < 1 / (1 + np.exp(-logit)), 0).astype(np.int8)
        columns[name] = pa.array(labels[name], pa.int8(), mask=~judged)
    for name in tasks:
        columns[f"p_{name}"] = pa.array(1 / (1 + np.exp(-logit - own.normal(0, noise, rows))), pa.float32())
    return pa.table(columns)


def encoder_output(path: Path) -> Path:
    """Commit an encoder's output with its held-out metrics."""
    rng = np.random.default_rng(3)
    histogram = (rng.dirichlet([4.0, 5.0, 4.0], size=15) * 4000).astype(int)
    shares = histogram / histogram.sum(axis=1, keepdims=True)
    signals = {
        "text_embedding": {"loss": 0.2134},
        "copurchase_embedding": {"loss": 0.4127},
        "department": {"loss": 0.3125, "top1": 0.942},
        "brand": {"loss": 2.4021, "top1": 0.487},
    }
    digits = {
        "histogram": histogram.tolist(),
        "entropy_bits": (-shares * np.log2(shares)).sum(axis=1).tolist(),
        "most_bits": float(np.log2(3)),
        "dead_share": [0.0] * 15,
    }
    values = {"holdout": {"items": 4000, "unique_share": 0.871, "signals": signals, "digits": digits}}

    def write(staging: Path) -> None:
        (staging / "summary.json").write_text(json.dumps(values))
        (staging / "config.yaml").write_text("encoder:\n  quantizer: {kind: fsq}\n")

    return committed(path, "encoder", write, config="e")
