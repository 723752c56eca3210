"""Items per second of the encoder's training by number of ranks, its wait for data, and the gain by torch.compile.

`python -m benchmarks.training [--quick] [--out DIR]`. Stage `encoder` runs as usual, under torchrun.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sidestack.benchmarks.goals import goal, publish
from sidestack.benchmarks.items import NETWORKS, items_spec, random_batch, write_items
from sidestack.benchmarks.record import results_folder
from sidestack.benchmarks.timing import Contestant, Spread, run_program, spread, take_turns, threads
from sidestack.encoder.config import EncoderConfig, TrainingConfig
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.signals import chosen_signals
from sidestack.infra.config import plain, to_yaml

COLUMNS = {
    "what": "", "ranks": "d", "batch": "d", "items_per_second": ",.0f", "wait_share": ".2%", "peak_mib": ".0f",
    "note": "",
}  # fmt: skip
WORDS = """
Items with an embedding of 64 halves and a category. "training" is stage `encoder` under torchrun, with one thread a
rank: items a second are those of its summary, over all its steps, held-out items, codebook starts and measuring
included; wait_share is the share of that time that ranks waited for data. "step" is forward and backward of one batch
that lies ready, in one process and thread, as it is and under torch.compile.
"""
WAIT_GOAL = 0.05


@dataclass(frozen=True)
class Sizes:
    """Items and epochs of a training, its repetitions, and rounds of the step."""

    items: int
    networks: tuple[str, ...]
    batches: tuple[int, ...]
    repetitions: int
    rounds: int


FULL = Sizes(items=60_000, networks=("default", "1,024 units"), batches=(256, 1024), repetitions=1, rounds=9)
QUICK = Sizes(items=20_000, networks=("default",), batches=(1024,), repetitions=1, rounds=0)


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small network, without torch.compile")
    parser.add_argument("--out", type=Path, help="where training.json and training.md go")
    arguments = parser.parse_args()
    out = results_folder(arguments.out, quick=arguments.quick)
    sizes = QUICK if arguments.quick else FULL
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sidestack-training-") as folder, threads(1):
        write_items(Path(folder) / "items", sizes.items)
        for network in sizes.networks:
            for precision in precisions():
                rows += training_rows(Path(folder), network, precision, sizes)
        for network in sizes.networks if sizes.rounds else ():
            rows += step_rows(network, max(sizes.batches), sizes.rounds)
    publish("training", "Training speed", WORDS, rows + _goals(rows), COLUMNS, out=out)


def precisions() -> list[str]:
    """Return the precisions to measure here: bfloat16 is for GPUs."""
    return ["float32", "bfloat16"] if torch.cuda.is_available() else ["float32"]


def rank_numbers() -> tuple[int, ...]:
    """Return the numbers of ranks to measure: one and two, at most the number of GPUs if there are any."""
    gpus = torch.cuda.device_count()
    return tuple(ranks for ranks in (1, 2) if not gpus or ranks <= gpus)


def training_rows(folder: Path, network: str, precision: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Train on one and two ranks in turns, for every batch size (for the wide network, only the largest)."""
    rows = []
    for batch in sizes.batches if network == "default" else sizes.batches[-1:]:
        runs = [(ranks, _train(folder, network, precision, batch, ranks))
                for _ in range(sizes.repetitions) for ranks in rank_numbers()]  # fmt: skip
        for ranks in rank_numbers():
            own = [run for number, run in runs if number == ranks]
            rate = spread([run["items_per_second"] for run in own])
            rows.append(
                {
                    "what": f"training, {network}, {precision}", "ranks": ranks, "batch": batch,
                    "items_per_second": rate.median, "low": rate.low, "high": rate.high,
                    "wait_share": max(run["data_wait_share"] for run in own),
                    "peak_mib": max(run["peak_bytes"] for run in own) / 2**20,
                }
            )  # fmt: skip
    return rows


def _train(folder: Path, network: str, precision: str, batch: int, ranks: int) -> dict[str, Any]:
    """Run stage `encoder` for one epoch, and return its summary."""
    settings = {"epochs": 1, "batch_size": batch, "precision": precision, "checkpoint_every": 0}
    training = TrainingConfig.model_validate(settings)
    config = EncoderConfig(network=NETWORKS[network], training=training)
    (folder / "config.yaml").write_text(to_yaml({"encoder": plain(config)}), encoding="utf-8")
    out = folder / "out"
    finished = run_program(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
         "sidestack.encoder.train", "--config", str(folder / "config.yaml"), "--input", f"dataset={folder / 'items'}",
         "--out", str(out)],
        {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return {**summary, "peak_bytes": finished.peak_bytes}


def step_rows(network: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time forward and backward, eager and compiled, on a GPU if there is one."""
    torch.manual_seed(0)
    model = VQFusion(EncoderConfig(network=NETWORKS[network]), chosen_signals({}, items_spec(1))).train().to(_device())
    found = {"ranks": 1, "batch": batch}
    compiled = torch.compile(model)
    began = time.perf_counter()
    try:
        _step(compiled, batch)()
    except Exception as error:  # torch.compile needs a C++ compiler on a CPU; the row notes the error
        note = f"torch.compile does not work here: {type(error).__name__}"
        return [{"what": f"step, {network}, compiled", **found, "note": note}]
    compile_s = time.perf_counter() - began
    plain_step, compiled_step = f"step, {network}", f"step, {network}, compiled"
    contestants = {
        plain_step: Contestant(_step(model, batch), batch),
        compiled_step: Contestant(_step(compiled, batch), batch),
    }
    times = take_turns(contestants, rounds)
    pays = times.ratio(compiled_step, plain_step)
    note = f"{pays.median:.2f} x as fast ({pays.low:.2f} to {pays.high:.2f}); compiled in {compile_s:.0f} s"
    notes = {plain_step: None, compiled_step: note}
    return [{"what": name, **found, **_rate(times.rate(name)), "note": notes[name]} for name in contestants]


def _rate(rate: Spread) -> dict[str, float]:
    return {"items_per_second": rate.median, "low": rate.low, "high": rate.high}


def _step(model: Callable[..., Any], rows: int) -> Callable[[], None]:
    batch = random_batch(rows).to(_device())

    def step() -> None:
        torch.autograd.backward(model(batch, rows).total)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare every training's wait for data with the goal; the ratio is the share of time without waiting."""
    goals = []
    for row in rows:
        if "wait_share" in row:
            busy = 1 - row["wait_share"]
            what = f"time not waiting for data, {row['what']}, {row['ranks']} ranks, batch {row['batch']}"
            goals.append(goal(what, Spread(busy, busy, busy), 1 - WAIT_GOAL))
    return goals


if __name__ == "__main__":
    main()
