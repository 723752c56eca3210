"""What a stage reports of a trained arm: metrics, budget, cost and speed, in `summary.json` and `plan.json`."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from sidestack.infra.distributed import gather
from sidestack.infra.stage import StageRun
from sidestack.ranker.budget import describe_decisions
from sidestack.ranker.config import RankerConfig, iso_dates
from sidestack.ranker.cost import column_cost, embedding_bytes, peak_memory_bytes
from sidestack.ranker.fit import Fitted
from sidestack.ranker.id_tables import describe_tables
from sidestack.ranker.metric_registry import all_metrics, compared_metrics
from sidestack.ranker.metrics import named_metrics, prediction_metrics
from sidestack.ranker.preparation import PreparedTraining
from sidestack.ranker.reader import Split
from sidestack.ranker.sharding import ShardedRanker, plan_facts, real_bytes, table_bytes


def write_summary(
    run: StageRun[RankerConfig], prepared: PreparedTraining, fitted: Fitted, held_out_rows: int, flops: float
) -> None:
    """Measure the predictions in the stage's output, and write and log its summary; every rank must call.

    Args:
        run: the stage's. prepared: its inputs. fitted: the trained model. held_out_rows: the rows that were read.
        flops: floating-point operations of one row's forward pass.
    """
    world, sharded = run.world, fitted.model.sharded
    entries, entries_cut = np.sum(gather(world, fitted.model.runner.newest.counts), axis=0).tolist()
    memory, stored = peak_memory_bytes(world), real_bytes(sharded, world)
    if not world.is_main:
        return
    if entries_cut:
        run.log.info(f"histories were cut to their newest entries: {entries_cut:,} of {entries:,} were left out")
    config, fitting, held_out = fitted.config, prepared.fitting, prepared.held_out
    measured = prediction_metrics(run.out, tuple(prepared.features.tasks))
    summary = {
        "arm": config.arm,
        "tasks": measured,
        **_cost(sharded, fitting, config),
        **_training(run, prepared, fitted),
        "world_size": world.size,
        "held_out_rows": held_out_rows,
        "flops_per_sample": flops,
        "history_entries_cut": entries_cut,
        "peak_memory_bytes": memory,
        "plan": plan_facts(sharded.plan, stored),
        **describe_tables(fitting, held_out, config.model.embedding_dim),
    }
    plan = {**sharded.plan.describe(), "real_bytes": stored}
    (run.out / "plan.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")
    run.log.metrics(summary["steps"], named_metrics(config.holdout.kind, measured, all_metrics()))
    run.log.summary(summary)
    run.log.info(_closing_line(config, measured, summary["samples_per_second"]))


def _training(run: StageRun[RankerConfig], prepared: PreparedTraining, fitted: Fitted) -> dict[str, Any]:
    """Return how the arm was trained: steps and speed, budget, dates, labels, admitted ids, and its warm start."""
    trained, fitting, held_out, start = fitted.trainer.summary(), prepared.fitting, prepared.held_out, prepared.start
    validation = None if fitted.validation is None else asdict(fitted.validation)
    decisions = describe_decisions(run.config, fitted.config, prepared.days, trained["steps"])
    return {
        **trained,
        "budget": {**decisions, "validation": validation},
        "dates": {"train": iso_dates(fitting.dates), "held_out": iso_dates(held_out.dates)},
        "labels": {name: _by_task(split) for name, split in (("train", fitting), ("held_out", held_out))},
        "admission": {column: turnover._asdict() for column, turnover in prepared.turnover.items()},
        "starts_from": None if start is None else {"path": str(run.inputs["start"]), "sids_anew": start.sids_anew},
    }


def _cost(sharded: ShardedRanker, split: Split, config: RankerConfig) -> dict[str, Any]:
    features = split.features
    content = column_cost(split.dataset, split.dates, tuple(features.sid_columns))
    raw = embedding_bytes(features, split.dataset, split.dates)
    dim = config.model.embedding_dim
    tables = table_bytes(features, dim)
    dense = sum(parameter.numel() for parameter in sharded.dense_optimizer.params.values())
    return {
        "sid_table_bytes": table_bytes(features, dim, only_sids=True),
        "table_bytes": tables,
        "feature_bytes_per_row": content.compressed + raw,
        "feature_bytes_per_row_uncompressed": content.uncompressed + raw,
        "parameters": dense + tables // 4,
    }


def _by_task(split: Split) -> dict[str, list[str]] | None:
    return None if split.labels is None else {task: iso_dates(dates) for task, dates in split.labels.items()}


def _closing_line(config: RankerConfig, measured: dict[str, dict[str, Any]], samples_per_second: float) -> str:
    shown = [metric.name for metric in compared_metrics()]
    parts = [f"{name} {value:.4f}" for name, value in named_metrics(config.holdout.kind, measured, shown).items()]
    return f"{config.arm}: {', '.join(parts)}, {samples_per_second:,.0f} samples/s"
