"""The report of a dry run of the planner, as text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table

from sidestack.infra.console import wide_console
from sidestack.ranker.planner import RESERVED_SHARE


def print_report(report: dict[str, Any]) -> None:
    """Print the report that `ranker.plan.dry_run` returns."""
    console = wide_console()
    cluster, training = report["cluster"], report["training"]
    kind = "GPUs" if cluster["device"] == "cuda" else "CPU ranks"
    console.print(f"{report['arm']}: fits on {cluster['ranks']} {kind}, {cluster['ranks_per_node']} a node")
    console.print(_tables(report))
    console.print(_table(("memory of a rank", "tables take", "of"), _memory(report)))
    rows, exchange = report["batch_size_per_rank"], report["exchange"]
    console.print(f"exchange: bytes that a rank, with {rows:,} rows of its own, sends in a step (mean over ranks)")
    console.print(_exchanges(report))
    mean, most, dense = (_bytes(exchange[name]) for name in ("rank_bytes_mean", "rank_bytes_most", "dense_bytes"))
    console.print(f"together {mean} a rank, {most} the busiest, and {dense} for the gradients of the network")
    if any("uvm" in table["kernel"] for table in report["tables"].values()):
        console.print("tables in host memory: what cache misses move between host and GPU is not counted")
    for line in (*_training_lines(training), *_sid_lines(report["sid_columns"], training["rows"])):
        console.print(line)


def _tables(report: dict[str, Any]) -> Table:
    lines = []
    for name, table in report["tables"].items():
        shards = table["shards"]
        where = f"rank {shards[0]['rank']}" if len(shards) == 1 else f"{len(shards)} of {shards[0]['size'][0]:,} rows"
        lookups, size = f"{table['lookups']:,} x {table['ids']:g}", _bytes(report["bytes"][name])
        lines.append((
            name, f"{table['rows']:,}", f"{table['dim']}", lookups, size, table["sharding"], table["kernel"], where,
        ))  # fmt: skip
    return _table(("table", "rows", "dim", "lookups x ids", "weights, state", "sharding", "kernel", "parts"), lines)


def _memory(report: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    ranks, cluster = report["estimated_rank_bytes"], report["cluster"]
    raw = sum(report["bytes"].values()) / len(ranks)
    yield "weights and optimizer state, mean", _bytes(raw), ""
    for kind, reserved in (("device", RESERVED_SHARE), ("host", 0.0)):
        own = [each[kind] for each in ranks]
        if cluster[f"{kind}_bytes"]:
            name = f"{'GPU' if kind == 'device' else 'host'}, planner's estimate"
            free = f", {reserved:.0%} left free" if reserved else ""
            yield name, f"{_bytes(min(own))} to {_bytes(max(own))}", f"{_bytes(cluster[f'{kind}_bytes'])}{free}"


def _exchanges(report: dict[str, Any]) -> Table:
    lines = [
        (name, _bytes(own["ids"]), _bytes(own["forward"]), _bytes(own["backward"]), own["ids_sum"], own["vectors_sum"])
        for name, own in report["exchange"]["tables"].items()
    ]
    return _table(("table", "ids", "forward", "backward", "ids =", "forward + backward ="), lines)


def _training_lines(training: dict[str, Any]) -> Iterator[str]:
    if training["rows"] is not None:
        epochs, rows, batch = training["epochs"], training["rows"], training["batch_size"]
        most = "at most " if training["validation_days"] else ""
        yield (
            f"training: {rows:,} rows / {batch:,} x {most}{epochs} epochs = {training['steps']:,} steps,"
            f" in which a rank sends {_bytes(training['rank_bytes'])} for its tables"
        )
    if "samples_per_second" in training:
        rate = training["samples_per_second"]
        hours = f"{training['hours']:,.1f} hours, " if "hours" in training else ""
        yield f"at {rate:,.0f} samples/s: {hours}{_bytes(training['bytes_per_second'])}/s sent by the busiest rank"


def _sid_lines(sids: dict[str, Any], rows: int | None) -> Iterator[str]:
    if not sids["columns"]:
        return
    text = f"SID columns: {sids['ids_per_row']:g} ids a row, {sids['int64_bytes_per_row']:g} B as int64"
    if sids["stored_bytes_per_row"] is not None:
        text += f", {sids['stored_bytes_per_row']:.1f} B in Parquet"
    if rows is not None:
        stored = f", {_bytes(sids['stored_bytes'])} in Parquet" if sids["stored_bytes"] is not None else ""
        text += f"; {rows:,} rows: {_bytes(sids['int64_bytes'])} as int64{stored}"
    yield text


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right")
    for line in lines:
        table.add_row(*line)
    return table


def _bytes(number: float) -> str:
    power = min(int(math.log(number, 1024)), 5) if number >= 1 else 0
    scaled, unit = number / 1024**power, ("B", "KiB", "MiB", "GiB", "TiB", "PiB")[power]
    return f"{scaled:,.3g} {unit}" if scaled < 1000 else f"{scaled:,.0f} {unit}"
