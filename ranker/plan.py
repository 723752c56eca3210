"""A dry run of the planner: how an arm's tables are placed on a given cluster, without its GPUs, and the costs.

    python -m ranker.plan --config FILE --set ranker.arm=sid_ngram --input-spec dataset.json --sid-spec sid.json \
        --ranks 8 --memory-gib 80 --table-rows item_id=1000000000 --rows 29000000000 --samples-per-second 1000000

Instead of two specs, `--dataset DIR` takes a materialized dataset, and measures its histories, rows and SID columns.
A training on such ranks would make the same plan, by the same code. Exits with 1 if the tables do not fit.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.config import Config, load_section, parse
from sidestack.infra.errors import ConfigError, SidestackError
from sidestack.infra.lanes import require_lanes
from sidestack.infra.remote.urls import local_argument, path_argument
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.stage import quiet
from sidestack.infra.tables import DatasetSpec, read_json
from sidestack.ranker.budget import LARGE_LOG, DecidedConfig, decide, even_days, training_days
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.constants import ModelConstants, shaped_constants
from sidestack.ranker.cost import column_cost, expected_traffic
from sidestack.ranker.exchange import ID_BYTES, LENGTH_BYTES, NUMBER_BYTES, count_all_sent, count_sent
from sidestack.ranker.features import ArmFeatures, arm_features, dataset_sids
from sidestack.ranker.plan_report import print_report
from sidestack.ranker.planner import (
    GIB,
    Cluster,
    NoPlanError,
    PlannedTable,
    TablePlan,
    Traffic,
    plan_tables,
    unsharded_model,
)

S = TypeVar("S", bound=Config)
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Workload:
    """The training to plan for.

    Attributes:
        config: the arm's, decided. features: what it reads and looks up. constants: the shapes of its constants.
        traffic: average lookups of a batch. rows: training rows; None if not given.
        sid_bytes_per_row: bytes of the SID columns in Parquet; None if no dataset was measured.
    """

    config: DecidedConfig
    features: ArmFeatures
    constants: ModelConstants
    traffic: Traffic
    rows: int | None
    sid_bytes_per_row: float | None


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan of the command line's cluster and workload.

    Raises:
        SystemExit: with 1 if the tables do not fit or an argument is invalid.
    """
    quiet()
    arguments = _parse(argv)
    try:
        report = dry_run(_workload(arguments), _cluster(arguments), arguments.samples_per_second)
    except SidestackError as error:
        if arguments.json and isinstance(error, NoPlanError):
            arguments.json.write_text(
                json.dumps({"fits": False, "reason": str(error).splitlines()}, indent=1) + "\n", encoding="utf-8"
            )
        word = "does not fit" if isinstance(error, NoPlanError) else "error"
        print(f"plan: {word}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_report(report)


def dry_run(work: Workload, cluster: Cluster, samples_per_second: float | None = None) -> dict[str, Any]:
    """Plan, and add up the plan's costs.

    Args:
        work: the training. cluster: the ranks. samples_per_second: over all ranks, for hours and bandwidth.

    Returns:
        `TablePlan.describe()`, with `fits`, `arm`, `bytes`, `exchange`, `training` and `sid_columns`, all JSON.

    Raises:
        ConfigError: batches and lanes do not divide. NoPlanError: the tables do not fit.
    """
    training = work.config.training
    require_lanes(training.batch_size, training.lanes, cluster.ranks)
    model = unsharded_model(work.features, work.config, torch.device("meta"), work.constants)
    plan = plan_tables(model, work.features, work.config, cluster, work.traffic)
    exchange = _exchange(plan, sum(parameter.numel() for parameter in model.body.parameters()))
    return {
        "fits": True,
        "arm": work.config.arm,
        **plan.describe(),
        "bytes": {table.name: table.bytes for table in plan.tables},
        "exchange": exchange,
        "training": _training(work, exchange, samples_per_second),
        "sid_columns": _sid_columns(work),
    }


def _exchange(plan: TablePlan, dense: int) -> dict[str, Any]:
    ranks, everything = plan.cluster.ranks, count_all_sent(plan)
    tables = {}
    for table in plan.tables:
        own = count_sent(table, ranks)
        means = {name.removesuffix("_R"): float(values.mean()) for name, values in own._asdict().items()}
        tables[table.name] = means | _arithmetic(table, ranks)
    return {
        "tables": tables,
        "rank_bytes_mean": float(everything.total().mean()),
        "rank_bytes_most": float(everything.total().max()),
        "dense_bytes": 2 * (ranks - 1) / ranks * dense * NUMBER_BYTES,
    }


def _arithmetic(table: PlannedTable, ranks: int) -> dict[str, str]:
    """Return the arithmetic of `count_sent` as text, as the mean over ranks."""
    share, ids = f"{ranks - 1}/{ranks} x {table.lookups}", table.ids
    asked = sum(shard.size[0] for shard in table.shards) / table.rows  # how many shards each id is sent to
    columns = sum(shard.size[1] for shard in table.shards)  # over all partial sums of a pooled row
    numbers = f"{columns}" if table.is_pooled else f"{ids:g} x {table.dim}"
    return {
        "ids_sum": f"{share} x ({ID_BYTES} x {ids * asked:g} + {LENGTH_BYTES} x {len(table.shards)})",
        "vectors_sum": f"2 x {share} x {NUMBER_BYTES} x {numbers}",
    }


def _training(work: Workload, exchange: dict[str, Any], samples_per_second: float | None) -> dict[str, Any]:
    training = work.config.training
    found: dict[str, Any] = {"batch_size": training.batch_size, "epochs": training.epochs, "rows": work.rows}
    found["validation_days"] = training.validation_days
    if work.rows is not None:
        found["steps"] = work.rows // training.batch_size * training.epochs
        found["rank_bytes"] = found["steps"] * exchange["rank_bytes_mean"]
    if samples_per_second is not None:
        found["samples_per_second"] = samples_per_second
        sent_a_step = exchange["rank_bytes_most"] + exchange["dense_bytes"]
        found["bytes_per_second"] = samples_per_second / training.batch_size * sent_a_step
        if work.rows is not None:
            found["hours"] = work.rows * training.epochs / samples_per_second / 3600
    return found


def _sid_columns(work: Workload) -> dict[str, Any]:
    columns = work.features.sid_columns
    history = sum(name.startswith("history_") for name in columns)
    ids = len(columns) - history + work.traffic.history * history
    stored = work.sid_bytes_per_row
    return {
        "columns": list(columns),
        "ids_per_row": ids,
        "int64_bytes_per_row": 8 * ids,
        "stored_bytes_per_row": stored,
        "int64_bytes": None if work.rows is None else 8 * ids * work.rows,
        "stored_bytes": None if work.rows is None or stored is None else stored * work.rows,
    }


def _workload(arguments: argparse.Namespace) -> Workload:
    rows_of_tables = [f"ranker.model.table_rows.{override}" for override in arguments.table_rows]
    config = load_section(RankerConfig, arguments.config, "ranker", [*arguments.set, *rows_of_tables]).resolved()
    rows: int | None = arguments.rows
    stored: float | None = None
    if arguments.dataset:
        dataset = read_dataset(arguments.dataset)
        spec = dataset.spec
        features = arm_features(spec, config, dataset_sids(dataset))
        traffic = expected_traffic(dataset, spec.train, config.training)
        stored = column_cost(dataset, spec.train, tuple(features.sid_columns)).compressed
        days = even_days(spec.train, rows) if rows else training_days(dataset, spec.train)
        rows = sum(day.rows for day in days)
    else:
        spec = _spec(DatasetSpec, arguments.input_spec)
        sids = [_spec(SidSpec, file) for file in arguments.sid_spec]
        features = arm_features(spec, config, {sid.name: sid for sid in sids})
        traffic = Traffic(float(spec.max_history))  # the maximum of a request, as the mean is not known
        days = even_days(spec.train, rows or LARGE_LOG)
    constants = shaped_constants(features.constants, spec)
    decided = decide(config, days)
    if arguments.mean_history:
        traffic = traffic._replace(history=arguments.mean_history)
    return Workload(decided, features, constants, traffic, rows, stored)


def _spec(kind: type[S], file: Path) -> S:
    return parse(kind, read_json(file), str(file))


def _cluster(arguments: argparse.Namespace) -> Cluster:
    ranks, per_node = arguments.ranks, arguments.ranks_per_node or min(arguments.ranks, 8)
    if ranks % per_node:
        raise ConfigError(f"--ranks {ranks}: must be a multiple of --ranks-per-node, {per_node}")
    memory, host = int(arguments.memory_gib * GIB), int(arguments.host_memory_gib * GIB)
    if arguments.device == "cpu":
        return Cluster("cpu", ranks, per_node, 0, memory)
    return Cluster("cuda", ranks, per_node, memory, host)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ranker.plan", description="Plan an arm's tables for ranks to come."
    )
    add = parser.add_argument
    add("--config", type=path_argument, required=True, help="the run's YAML file")
    add("--set", action="append", default=[], metavar="A.B=C", help="override a config value, such as ranker.arm=side")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", type=path_argument, help="a materialized dataset, to be measured")
    source.add_argument(
        "--input-spec", type=local_argument, help="a dataset's description (DatasetSpec, JSON) without the data"
    )
    add(
        "--sid-spec",
        type=local_argument,
        action="append",
        default=[],
        help="with --input-spec: SIDs it would have (SidSpec, JSON)",
    )
    add(
        "--table-rows",
        action="append",
        default=[],
        metavar="COLUMN=ROWS",
        help="rows of an id table: short for --set ranker.model.table_rows.COLUMN=ROWS, which a training takes as well",
    )
    add("--mean-history", type=float, help="history entries an event; by default measured, or the most there may be")
    add("--ranks", type=_positive(int), required=True, help="how many GPUs, or processes on CPUs")
    add("--ranks-per-node", type=_positive(int), help="how many share a host; by default all, at most 8")
    add("--memory-gib", type=_positive(float), required=True, help="memory of a GPU; of a rank's host share on a CPU")
    add("--host-memory-gib", type=float, default=128.0, help="a GPU rank's share of its host's memory; 128 by default")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="what the ranks compute on")
    add("--rows", type=_positive(int), help="training rows; by default the dataset's")
    add("--samples-per-second", type=_positive(float), help="over all ranks, as measured or hoped for")
    add("--json", type=local_argument, help="also write the plan into this file")
    return parser.parse_args(argv)


def _positive(kind: type[N]) -> Callable[[str], N]:
    def read(text: str) -> N:
        number = kind(text)
        if number <= 0:
            raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
        return number

    return read


if __name__ == "__main__":
    main()
