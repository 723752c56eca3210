"""The `baseline` stage: boosted trees on the ranker's rows, with the same output as a ranker's arm.

In reading order: read the training dates with their features, fit a classifier per task, continue through the held-out
dates and predict each of their rows, write predictions and summary. Only one process works.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import DataError
from sidestack.infra.impressions import columns_by_table
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.rows import Rows
from sidestack.infra.snapshot import CONTENT, Dataset, read_dataset
from sidestack.infra.stage import StageRun
from sidestack.infra.tables import TaskSpec
from sidestack.ranker.baseline.boosting import TaskModel, fit_task
from sidestack.ranker.baseline.columns import Floats, judged_labels
from sidestack.ranker.baseline.config import ARM, BaselineConfig
from sidestack.ranker.baseline.features import Block, RowFeatures, columns_read
from sidestack.ranker.config import Dates, iso_dates
from sidestack.ranker.cost import peak_memory_bytes
from sidestack.ranker.features import weighted_tasks
from sidestack.ranker.metric_registry import all_metrics, compared_metrics
from sidestack.ranker.metrics import named_metrics, prediction_metrics, prediction_rows, prediction_schema
from sidestack.ranker.predictions import FOLDER as PREDICTIONS


@dataclass(frozen=True)
class TrainingRows:
    """The training rows, in order of date.

    Attributes:
        x_NF: the features that vary. labels_TN: by task; -1 where not judged.
        names: the features'. is_category_F: which of them are categories.
    """

    x_NF: Floats
    labels_TN: NDArray[np.int8]
    names: tuple[str, ...]
    is_category_F: NDArray[np.bool_]


def run_baseline(run: StageRun[BaselineConfig]) -> None:
    """Fit and measure the baseline, on rank 0.

    Raises:
        ConfigError: validation would leave no date to train on. DataError: rows break the contract, a split has no
            rows, or the dataset names no task. CommitError: a partition is missing, or was altered.
    """
    if not run.world.is_main:
        return
    config, began = run.config, time.perf_counter()
    dataset = read_dataset(run.inputs["dataset"])
    tasks = weighted_tasks(dataset.spec, {})
    dates, held_out = config.holdout.windows(dataset.spec)
    num_rows = {window: _count_rows(dataset, window) for window in (dates, held_out)}
    dataset.verify(ALONE, _partitions_read(dataset, (dates, held_out)))
    features = RowFeatures(dataset, tasks)
    rows = read_training_rows(features, dates, num_rows[dates], run)
    models = {
        task: fit_task(rows.x_NF[label_N >= 0], label_N[label_N >= 0], rows.is_category_F, config)
        for task, label_N in zip(tasks, rows.labels_TN, strict=True)
    }
    train_seconds = time.perf_counter() - began
    _log_models(run, models)
    predict(features.read(held_out), tasks, models, rows.names, run.out / PREDICTIONS)
    facts = {
        "dates": {"train": iso_dates(dates), "held_out": iso_dates(held_out)},
        "held_out_rows": num_rows[held_out],
        "samples_per_second": num_rows[dates] / train_seconds,
        "train_seconds": train_seconds,
        "features": list(rows.names),
    }
    _close(run, models, facts)


def _close(run: StageRun[BaselineConfig], models: Mapping[str, TaskModel], facts: Mapping[str, Any]) -> None:
    """Measure the predictions, and write the summary."""
    kind, measured = run.config.holdout.kind, prediction_metrics(run.out, tuple(models))
    run.log.metrics(0, named_metrics(kind, measured, all_metrics()))
    run.log.summary({
        "arm": ARM,
        "tasks": measured,
        "sid_table_bytes": 0,
        "table_bytes": 0,
        "feature_bytes_per_row": 0.0,
        "peak_memory_bytes": peak_memory_bytes(ALONE),
        "train_rows": {task: model.rows for task, model in models.items()},
        "trees": {task: model.trees for task, model in models.items()},
        **facts,
    })  # fmt: skip
    shown = named_metrics(kind, measured, [metric.name for metric in compared_metrics()])
    run.log.info(f"{ARM}: {', '.join(f'{name} {value:.4f}' for name, value in shown.items())}")
    run.facts["arm"] = ARM


def _count_rows(dataset: Dataset, dates: Dates) -> int:
    rows = sum(entry.rows for entry in dataset.partitions("events", *dates))
    if not rows:
        raise DataError(f"{dataset.path}: the snapshot has no events from {dates[0]} to {dates[1]}")
    return rows


def _partitions_read(dataset: Dataset, windows: Sequence[Dates]) -> list[PartitionEntry]:
    tables = [table for of_kind in columns_by_table(dataset, columns_read(dataset.spec)) for table in of_kind]
    dated = [entry for dates in windows for table in tables for entry in dataset.partitions(table, *dates)]
    return [*dataset.partitions(CONTENT["item"]), *dated]


def read_training_rows(
    features: RowFeatures, dates: Dates, num_rows: int, run: StageRun[BaselineConfig]
) -> TrainingRows:
    """Read all rows of the training dates or a sample; features that do not vary are left out."""
    config, rng = run.config, np.random.default_rng(run.config.seed)
    share = min(1.0, config.max_train_rows / num_rows)
    labels: list[NDArray[np.int8]] = []
    parts: dict[str, list[Floats]] = {}
    with run.log.progress(num_rows, f"read {ARM}") as advance:
        for table, by_name in features.read(dates):
            kept_N = rng.random(table.num_rows) < share
            labels.append(judged_labels(table, features.tasks)[:, kept_N])
            for name, values_N in by_name.items():
                parts.setdefault(name, []).append(values_N[kept_N])
            advance(table.num_rows)
    labels_TN = np.concatenate(labels, axis=1)
    if share < 1:
        run.log.info(f"learns from {labels_TN.shape[1]:,} rows, a sample of {num_rows:,}: baseline.max_train_rows")
    columns = {name: values_N for name in list(parts) if _varies(values_N := np.concatenate(parts.pop(name)))}
    is_category_F = np.array([name in features.categorical for name in columns], np.bool_)
    x_NF = _side_by_side(list(columns.values()), labels_TN.shape[1])
    return TrainingRows(x_NF, labels_TN, tuple(columns), is_category_F)


def _side_by_side(columns: Sequence[Floats], num_rows: int) -> Floats:
    return np.stack(columns, axis=1) if columns else np.empty((num_rows, 0), np.float32)


def _varies(values_N: Floats) -> bool:
    is_known_N = ~np.isnan(values_N)
    known = values_N[is_known_N]
    return len(known) > 0 and bool(len(known) < len(values_N) or known.min() != known.max())


def _log_models(run: StageRun[BaselineConfig], models: Mapping[str, TaskModel]) -> None:
    for task, model in models.items():
        if model.classifier is None:
            run.log.info(
                f"{task}: {model.rows:,} training rows without a distinguishing feature; {model.rate:.3g} for every row"
            )
        else:
            run.log.info(f"{task}: {model.trees} trees from {model.rows:,} rows")


def predict(
    blocks: Iterator[Block],
    tasks: Mapping[str, TaskSpec],
    models: Mapping[str, TaskModel],
    names: Sequence[str],
    out: Path,
) -> None:
    """Write the predictions of rows, numbered in reading order, as a ranker numbers them."""
    start = 0
    with TableWriter(out / "part-00000.parquet", prediction_schema(tasks)) as writer:
        for table, by_name in blocks:
            x_NF = _side_by_side([by_name[name] for name in names], table.num_rows)
            rows_N = np.arange(start, start + table.num_rows)
            start += table.num_rows
            p_TN = [models[task].predict(x_NF) for task in tasks]
            writer.write(prediction_rows(Rows(table), rows_N, p_TN, tasks))
