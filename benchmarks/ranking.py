"""Latency and memory of a served ranker: `python -m benchmarks.ranking --model DIR [--clients 64] [--seconds 60]`.

DIR is the output of `ranker.export`. The model is measured in a fresh process, and behind `infra.serve` and `mlflow
models serve`, by one client with a persistent connection and by many concurrent clients. Goals: in process on one core,
500 candidates under 40 ms at the 99th percentile with 32 history entries, and under 60 ms with 1,000; with
`infra.serve`, resident memory under the model's bytes plus 400 MB; no error for any client.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.client import HTTPException
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sidestack.benchmarks.record import (
    Row,
    markdown_table,
    print_table,
    results_folder,
    source,
    write_results,
    yes_or_no,
)
from sidestack.benchmarks.scoring_server import Program, ScoringServer, resident_mib, serving
from sidestack.benchmarks.serving import percentiles
from sidestack.infra.scoring_app import load_answers
from sidestack.infra.sealed import unseal
from sidestack.ranker.serving.config import MODEL_FOLDER, SERVED_FILE, ServedConfig

CANDIDATES = 500
GOALS_MS = {32: 40.0, 1000: 60.0}
"""Goal for the 99th percentile in process, by history length."""
GOAL_MB = 400.0
"""Goal for memory in addition to the model's bytes."""
COLUMNS = {
    "where": "",
    "history": "d",
    "requests": "d",
    "p50_ms": ".1f",
    "p99_ms": ".1f",
    "a_second": ".1f",
    "errors": "d",
    "resident_mb": ".0f",
    "goal": "",
    "met": "",
}
WORDS = """
Requests of one user, a history, and 500 candidates, all of random ids that the model knows, with every column. "in
process" calls the loaded model with values as JSON holds them; its memory includes these values. The other rows are
servers with one worker on loopback, and include reading and writing JSON. A process uses one thread of torch. Memory is
resident memory after all requests, those of all clients among them; the goal is `infra.serve`'s.
"""
_IMPORTS = ("torch", "pyarrow", "sidestack.infra.scoring_app", "sidestack.ranker.serving.model", "mlflow.pyfunc")
"""The imports to measure, in this order; `infra.serve` imports all except the last."""
_DIFFERENT = 16
_PACKAGES = ("mlflow", "torch")


def read_config(model: Path) -> ServedConfig:
    """Return an exported model's configuration."""
    values = (model / MODEL_FOLDER / "artifacts" / "version" / SERVED_FILE).read_bytes()
    return ServedConfig.model_validate(unseal(values, SERVED_FILE)[0])


def random_requests(config: ServedConfig, history: int, number: int) -> list[dict[str, Any]]:
    """Draw random requests with ids and columns that the model knows."""
    spec, rng = config.ranker.spec, np.random.default_rng(0)

    def columns(dense: Sequence[str], sparse: dict[str, int]) -> dict[str, Any]:
        found: dict[str, Any] = {name: float(abs(rng.normal())) for name in dense}
        return found | {name: [int(rng.integers(0, size))] for name, size in sparse.items()}

    def candidate() -> dict[str, Any]:
        return {"item_id": int(rng.integers(0, spec.num_items)), **columns(spec.dense, spec.sparse)}

    return [
        {
            "user": {
                "user_id": int(rng.integers(0, spec.num_users)), **columns(spec.request_dense, spec.request_sparse)
            },
            "time": 1.7e9,
            "history": {
                "item_ids": rng.integers(0, spec.num_items, history).tolist(),
                "times": np.sort(1.7e9 - rng.integers(1, 10**7, history)).tolist(),
            },
            "candidates": [candidate() for _ in range(CANDIDATES)],
        }
        for _ in range(number)
    ]  # fmt: skip


def imports() -> list[Row]:
    """Measure the memory of a fresh process after each import."""
    program = f"""
import importlib, sys
from pathlib import Path
for name in {_IMPORTS}:
    importlib.import_module(name)
    print(int(Path("/proc/self/statm").read_text().split()[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    taken = [int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6 for pages in done.stdout.split()]
    return [{"where": f"after import {name}", "resident_mb": used} for name, used in zip(_IMPORTS, taken, strict=True)]


def in_process(model: Path, requests: int) -> list[Row]:
    """Load the model in this process and measure it; run this in a fresh process, so that its memory is the model's."""
    config = read_config(model)
    answers = load_answers(model / MODEL_FOLDER)
    rows: list[Row] = []
    for history, goal in GOALS_MS.items():
        drawn = random_requests(config, history, _DIFFERENT)
        inputs = [[drawn[n % _DIFFERENT]] for n in range(requests + _DIFFERENT)]
        times = percentiles(answers, inputs, _DIFFERENT)
        row = {"where": "in process", "history": history, "requests": requests, **times}
        rows.append({**row, "goal": f"p99 < {goal:.0f} ms", "met": yes_or_no(times["p99_ms"] < goal)})
    return [*rows, {"where": "in process", "resident_mb": resident_mib(os.getpid()) * 2**20 / 1e6}]


def over_http(model: Path, program: Program, requests: int, clients: int, seconds: float, log: Path) -> list[Row]:
    """Serve the model and measure it with one client and with many concurrent clients."""
    config, rows = read_config(model), list[Row]()
    with serving(model / MODEL_FOLDER, log, program) as server:
        for history in GOALS_MS:
            bodies = [json.dumps({"inputs": [one]}).encode() for one in random_requests(config, history, _DIFFERENT)]
            server.reconnect()  # the server closes connections that are idle for some seconds
            inputs = [bodies[n % _DIFFERENT] for n in range(requests + _DIFFERENT)]
            times = percentiles(server.post, inputs, _DIFFERENT)
            rows.append({"where": program, "history": history, "requests": requests, **times})
        bodies = [json.dumps({"inputs": [one]}).encode() for one in random_requests(config, 32, _DIFFERENT)]
        rows.append(
            {
                "where": f"{program}: {clients} clients for {seconds:.0f} s",
                **concurrent_load(server, bodies, clients, seconds),
            }
        )
        return [*rows, memory_row(model, program, server.resident_mib())]


def concurrent_load(server: ScoringServer, bodies: Sequence[bytes], clients: int, seconds: float) -> Row:
    """Run many concurrent clients for some time; each sends its next request after the answer."""
    until = time.monotonic() + seconds
    statuses, times = Counter[int](), list[float]()

    def ask(client: int) -> None:
        connection, number = server.connect(), client
        while time.monotonic() < until:
            began = time.perf_counter()
            try:
                status, _ = server.post(bodies[number % len(bodies)], connection)
            except (OSError, HTTPException):
                status = 0
                connection.close()
            statuses[status] += 1
            times.append(time.perf_counter() - began)
            number += 1
        connection.close()

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = np.percentile(np.array(times) * 1e3, [50, 99]).tolist()
    errors = statuses.total() - statuses[200]
    return {
        "history": 32, "requests": statuses.total(),
        "p50_ms": p50, "p99_ms": p99, "a_second": statuses[200] / seconds, "errors": errors, "goal": "no error",
        "met": yes_or_no(errors == 0),
    }  # fmt: skip


def memory_row(model: Path, program: Program, mib: float) -> Row:
    """Return a server's memory, compared with the goal if its program has one."""
    used = mib * 2**20 / 1e6
    row: Row = {"where": program, "resident_mb": used}
    if program != "infra.serve":
        return row
    own = sum(file.stat().st_size for file in (model / MODEL_FOLDER).rglob("*") if file.is_file()) / 1e6
    return {**row, "goal": f"< {own:.0f} + {GOAL_MB:.0f} MB", "met": yes_or_no(used < own + GOAL_MB)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the output of ranker.export")
    parser.add_argument("--requests", type=int, default=300, help="requests that are timed, of each kind")
    parser.add_argument("--clients", type=int, default=64, help="clients at once")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long they ask")
    parser.add_argument("--out", type=Path, help="where ranking.json and ranking.md go")
    arguments = parser.parse_args(argv)
    out = results_folder(arguments.out, quick=False)
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(1) as fresh:
        rows = [*imports(), *fresh.apply(in_process, (arguments.model, arguments.requests))]
        log = Path(folder) / "server.log"
        for program in get_args(Program):
            load = arguments.requests, arguments.clients, arguments.seconds
            rows += over_http(arguments.model, program, *load, log)
    described = read_config(arguments.model).ranker
    model = f"Arm `{described.config.arm}`, {sum(described.rows.values()):,} rows of tables, {described.spec.origin}."
    print_table("The served ranker", rows, COLUMNS)
    write_results("ranking", rows, packages=_PACKAGES, out=out)
    text = "\n\n".join(["# The served ranker", WORDS.strip(), model, source(_PACKAGES), markdown_table(rows, COLUMNS)])
    (out / "ranking.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
