"""Latency and memory of the served encoder: `python -m benchmarks.serving [--encoder DIR]`.

The model is saved as in stage `export` and then measured: called in a fresh process, and behind `infra.serve` and
`mlflow models serve` on loopback, by one client with a persistent connection. Goals: in process, at the 99th
percentile, one item under 20 ms and 256 items under 100 ms; under 1 GiB resident. (The paper reports 500 ms and
2.5 GB.)
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from sidestack.benchmarks.items import DEFAULT_SIGNALS
from sidestack.benchmarks.record import (
    Row,
    markdown_table,
    print_table,
    results_folder,
    source,
    write_results,
    yes_or_no,
)
from sidestack.benchmarks.scoring_server import Program, resident_mib, serving
from sidestack.encoder.bundle import load_bundle, save_bundle
from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.export import save_model
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.serving import Item, ServedConfig
from sidestack.encoder.signals import SignalSpec
from sidestack.infra.scoring_app import load_answers

GOALS_MS = {1: 20.0, 256: 100.0}
"""Goal for the 99th percentile in process, by items per request."""
GOAL_MIB = 1024.0
COLUMNS = {
    "where": "",
    "items": "d",
    "requests": "d",
    "p50_ms": ".2f",
    "p99_ms": ".2f",
    "resident_mib": ".0f",
    "goal": "",
    "met": "",
}
WORDS = """
Requests one after another, of one item or of 256, each item with the default data's seven signals. "in process" calls
the loaded model; the other rows are servers on loopback, one client that keeps its connection, and include reading 2 MB
of JSON for 256 items. The goals are for the process.
"""
_PACKAGES = ("mlflow",)
_DIFFERENT_ITEMS = 512
_DIFFERENT_BODIES = 16  # of 2 MB for 256 items


@dataclass(frozen=True)
class Load:
    """The number of timed requests, by items per request, and of warm-up requests before them."""

    requests: dict[int, int]
    warm_up: int


FULL = Load({1: 2000, 256: 300}, 50)
QUICK = Load({1: 30, 256: 5}, 3)


def random_encoder(path: Path) -> Path:
    """Write an untrained encoder of default sizes; time and memory do not depend on the weights."""
    torch.manual_seed(0)
    config = EncoderConfig()
    path.mkdir(parents=True)
    save_bundle(path, VQFusion(config, DEFAULT_SIGNALS), config)
    return path


def save_encoder_model(encoder: Path, out: Path) -> SignalSpec:
    """Save an encoder's model, for tables that store float16, and return its signals."""
    bundle = load_bundle(encoder, torch.device("cpu"))
    stored = dict.fromkeys(bundle.signals.embeddings, "float16")
    values = {"signals": bundle.signals, "spec": bundle.spec, "stored": stored, "max_items": max(GOALS_MS)}
    save_model(out, encoder, ServedConfig.model_validate(values), random_items(bundle.signals, 1)[0])
    return bundle.signals


def random_items(signals: SignalSpec, number: int) -> list[Item]:
    """Draw items with every signal, as plain values."""
    rng = np.random.default_rng(0)
    columns = {name: rng.standard_normal((number, dim)).tolist() for name, dim in signals.embeddings.items()}
    columns |= {name: rng.integers(0, size, number).tolist() for name, size in signals.categoricals.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def batches(signals: SignalSpec, size: int, number: int) -> list[list[Item]]:
    """Return the items of `number` requests, each beginning with another item."""
    items = random_items(signals, _DIFFERENT_ITEMS)
    return [[items[(first + i) % len(items)] for i in range(size)] for first in range(number)]


def percentiles(request: Callable[[Any], Any], inputs: Sequence[Any], warm_up: int) -> dict[str, float]:
    """Time consecutive requests; the first `warm_up` do not count."""
    seconds = []
    for value in inputs:
        started = time.perf_counter()
        request(value)
        seconds.append(time.perf_counter() - started)
    p50, p99 = np.percentile(np.array(seconds[warm_up:]) * 1e3, [50, 99]).tolist()
    return {"p50_ms": p50, "p99_ms": p99}


def in_process(model: Path, signals: SignalSpec, load: Load) -> list[Row]:
    """Load the model in this process and measure it; run this in a fresh process, so that its memory is the model's."""
    imported = resident_mib(os.getpid())
    answers = load_answers(model)
    rows: list[Row] = []
    for size, number in load.requests.items():
        times = percentiles(answers, batches(signals, size, load.warm_up + number), load.warm_up)
        goal = GOALS_MS[size]
        row = {"where": "in process", "items": size, "requests": number, **times}
        rows.append({**row, "goal": f"p99 < {goal:.0f} ms", "met": yes_or_no(times["p99_ms"] < goal)})
    used = resident_mib(os.getpid())
    rows.append({"where": "in process: imports alone", "resident_mib": imported})
    return [*rows, _memory_row("in process", used)]


def over_http(model: Path, program: Program, signals: SignalSpec, load: Load, log: Path) -> list[Row]:
    """Serve the model and measure it with prepared bodies; the server parses them."""
    rows: list[Row] = []
    with serving(model, log, program) as server:

        def request(body: bytes) -> None:
            status, answer = server.post(body)
            assert status == 200, answer

        for size, number in load.requests.items():
            bodies = [json.dumps({"inputs": items}).encode() for items in batches(signals, size, _DIFFERENT_BODIES)]
            server.reconnect()  # the server closes connections that are idle for some seconds
            inputs = [bodies[i % len(bodies)] for i in range(load.warm_up + number)]
            times = percentiles(request, inputs, load.warm_up)
            rows.append({"where": program, "items": size, "requests": number, **times})
        return [*rows, _memory_row(program, server.resident_mib())]


def _memory_row(where: str, mib: float) -> Row:
    return {"where": where, "resident_mib": mib, "goal": f"< {GOAL_MIB:.0f} MiB", "met": yes_or_no(mib < GOAL_MIB)}


def measured(encoder: Path | None, load: Load) -> list[Row]:
    """Save a model and measure it both ways."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        signals = save_encoder_model(encoder or random_encoder(place / "encoder"), place / "model")
        with get_context("spawn").Pool(1) as fresh:
            rows: list[Row] = fresh.apply(in_process, (place / "model", signals, load))
        for program in get_args(Program):
            rows += over_http(place / "model", program, signals, load, place / "server.log")
        return rows


def page(rows: Sequence[Row]) -> str:
    """Return the figures as Markdown, with their conditions."""
    return "\n\n".join(["# The served encoder", WORDS.strip(), source(_PACKAGES), markdown_table(rows, COLUMNS)])


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--encoder", type=Path, help="an encoder's committed directory; by default an untrained one")
    parser.add_argument("--quick", action="store_true", help="few requests; tells that it runs, not how fast")
    parser.add_argument("--out", type=Path, help="where serving.json and serving.md go")
    arguments = parser.parse_args(argv)
    out = results_folder(arguments.out, quick=arguments.quick)
    rows = measured(arguments.encoder, QUICK if arguments.quick else FULL)
    print_table("The served encoder", rows, COLUMNS)
    write_results("serving", rows, packages=_PACKAGES, out=out)
    (out / "serving.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
