"""Vectors per second: quantizers alone compared with faiss, and the encoder's network with its own matrix products.

`python -m benchmarks.encoding [--quick] [--out DIR]`. All at 24 bits from 384 dimensions: 15 ternary digits (23.8
bits), or 3 codebooks of 256 codewords.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sidestack.benchmarks.goals import goal, publish
from sidestack.benchmarks.items import DEFAULT_SIGNALS, NETWORKS
from sidestack.benchmarks.record import results_folder
from sidestack.benchmarks.timing import Contestant, Times, peak_bytes, take_turns, thread_numbers, threads
from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.encoding import BLOCK_ROWS
from sidestack.encoder.fusion import FusionEncoder, VQFusion
from sidestack.encoder.quantizers.fsq import Fsq, FsqConfig
from sidestack.encoder.quantizers.structured import Structured, StructuredConfig
from sidestack.encoder.signals import SignalBatch

DIM, DIGITS = 384, 15
COLUMNS = {
    "what": "", "threads": "d", "items_per_second": ",.0f", "low": ",.0f", "high": ",.0f", "peak_mib": ".1f",
}  # fmt: skip
_ITERATIONS = 4
"""Iterations of faiss's k-means: the quality of its codebooks does not change the encoding speed."""
WORDS = f"""
Random vectors of {DIM} dimensions to 24 bits; then items of the default data's signals through the network in the
blocks of {BLOCK_ROWS} rows in which `materialize` takes them. FSQ here is one matrix product to {DIGITS} numbers and
rounding, in the faster of the two memory layouts. "products alone" are the network's matrix products, same shapes,
nothing between them. Memory is what one call takes beyond what was resident.
"""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the benchmark."""

    fast_rows: int
    slow_rows: int
    train_rows: int
    items: int
    rounds: int


FULL = Sizes(fast_rows=1 << 16, slow_rows=1 << 13, train_rows=16_384, items=1 << 13, rounds=15)
QUICK = Sizes(fast_rows=1 << 14, slow_rows=1 << 10, train_rows=9_984, items=1 << 11, rounds=3)


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoding", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it runs")
    parser.add_argument("--out", type=Path, help="where encoding.json and encoding.md go")
    arguments = parser.parse_args()
    out = results_folder(arguments.out, quick=arguments.quick)
    sizes = QUICK if arguments.quick else FULL
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        contestants = quantizers(sizes)
        for number in thread_numbers():
            with threads(number):
                rows += quantizer_rows(contestants, sizes.rounds, number) + network_rows(sizes, number)
    publish("encoding", "Encoding speed", WORDS, rows, COLUMNS, packages=["faiss-cpu"], out=out)


def quantizers(sizes: Sizes) -> dict[str, Contestant]:
    """Return the quantizers alone, with faiss's trained."""
    generator = torch.Generator().manual_seed(0)
    h_BH = torch.randn(sizes.fast_rows, DIM, generator=generator)
    return {**_ours(h_BH, generator), **_faiss(h_BH, sizes)}


def quantizer_rows(contestants: dict[str, Contestant], rounds: int, number: int) -> list[dict[str, Any]]:
    """Measure the quantizers alone."""
    times = take_turns(contestants, rounds)
    fsq = times.fastest([name for name in contestants if name.startswith("FSQ")])
    goals = []
    for ours in ("DPCA, 3 groups x depth 5", "DPCA, depth 15"):
        goals += [
            goal(f"{ours} / FSQ", times.ratio(ours, fsq), 0.85, number),
            goal(f"{ours} / faiss RQ beam 5", times.ratio(ours, "faiss RQ 3x256, beam 5"), 8, number),
            goal(f"{ours} / faiss PQ", times.ratio(ours, "faiss PQ 3x256"), 4, number),
        ]
    return _measured(contestants, times, number) + goals


def _ours(h_BH: Tensor, generator: torch.Generator) -> dict[str, Contestant]:
    by_groups, deep = (_dpca(groups, h_BH, generator) for groups in (3, 1))
    fsq: Fsq = FsqConfig(digits=DIGITS).build()
    weight_NH = torch.randn(DIGITS, DIM, generator=generator) / DIM**0.5
    calls: dict[str, Callable[[], object]] = {
        "FSQ, digits by columns": lambda: fsq.encode(h_BH @ weight_NH.T),
        "FSQ, digits by rows": lambda: fsq.encode((weight_NH @ h_BH.T).T),
        "DPCA, 3 groups x depth 5": lambda: by_groups.encode(h_BH),
        "DPCA, depth 15": lambda: deep.encode(h_BH),
    }
    found = {name: Contestant(call, len(h_BH)) for name, call in calls.items()}
    few_BH = h_BH[: len(h_BH) // 8]
    return {**found, "DPCA, depth 15, plain loop": Contestant(lambda: deep.encode_by_residuals(few_BH), len(few_BH))}


def _dpca(groups: int, h_BH: Tensor, generator: torch.Generator) -> Structured:
    quantizer = StructuredConfig(groups=groups, depth=DIGITS // groups, group_dim=DIM // groups).build()
    quantizer.start(h_BH[:4096], generator)
    return quantizer


def _faiss(h_BH: Tensor, sizes: Sizes) -> dict[str, Contestant]:
    """Train faiss's product and residual quantizers; with beam 5, codes are found by look-up tables."""
    train_BH, few_BH = h_BH[: sizes.train_rows].numpy(), h_BH[: sizes.slow_rows].numpy()
    product = faiss.ProductQuantizer(DIM, 3, 8)
    product.cp.niter = _ITERATIONS
    product.train(train_BH)
    found = {"faiss PQ 3x256": Contestant(_codes(product, few_BH), len(few_BH))}
    for beam in (1, 5):
        residual = faiss.ResidualQuantizer(DIM, 3, 8)
        residual.cp.niter, residual.max_beam_size = _ITERATIONS, 1
        residual.train(train_BH)
        residual.max_beam_size, residual.use_beam_LUT = beam, int(beam > 1)
        found[f"faiss RQ 3x256, beam {beam}"] = Contestant(_codes(residual, few_BH), len(few_BH))
    return found


def _codes(quantizer: Any, x_BH: npt.NDArray[np.float32]) -> Callable[[], object]:
    return lambda: quantizer.compute_codes(x_BH)


def network_rows(sizes: Sizes, number: int) -> list[dict[str, Any]]:
    """Measure whole encoders and their matrix products alone."""
    rows = []
    for title, network in NETWORKS.items():
        torch.manual_seed(0)
        model = VQFusion(EncoderConfig(network=network), DEFAULT_SIGNALS).eval()
        blocks = list(_items(sizes.items).blocks(BLOCK_ROWS))
        contestants = {
            f"network ({title})": Contestant(_each(blocks, model.encoder), sizes.items),
            f"network and quantizer ({title})": Contestant(_each(blocks, model.digits), sizes.items),
            f"products alone ({title})": Contestant(_products(model.encoder, len(blocks)), sizes.items),
        }
        times = take_turns(contestants, sizes.rounds)
        ratio = times.ratio(f"network ({title})", f"products alone ({title})")
        rows += _measured(contestants, times, number)
        rows.append(goal(f"network ({title}) / its products alone", ratio, 0.8, number))
    return rows


def _each(blocks: list[SignalBatch], call: Callable[[SignalBatch], object]) -> Callable[[], object]:
    def through() -> None:
        for block in blocks:
            call(block)

    return through


def _products(encoder: FusionEncoder, blocks: int) -> Callable[[], object]:
    """Return a call that runs the linear layers' matrix products, without bias, on preallocated inputs and outputs."""
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.Linear)]
    parts = [
        (torch.randn(BLOCK_ROWS, layer.in_features), layer.weight.T, torch.empty(BLOCK_ROWS, layer.out_features))
        for layer in layers
    ]

    def multiply() -> None:
        for _ in range(blocks):
            for x_BI, weight_IO, out_BO in parts:
                torch.mm(x_BI, weight_IO, out=out_BO)

    return multiply


def _items(rows: int) -> SignalBatch:
    generator = torch.Generator().manual_seed(0)
    return SignalBatch(
        {name: torch.randn(rows, dim, generator=generator) for name, dim in DEFAULT_SIGNALS.embeddings.items()},
        {
            name: torch.randint(size, (rows,), generator=generator)
            for name, size in DEFAULT_SIGNALS.categoricals.items()
        },
        {name: torch.rand(rows, generator=generator) < 0.9 for name in DEFAULT_SIGNALS.names},
    )


def _measured(contestants: dict[str, Contestant], times: Times, number: int) -> list[dict[str, Any]]:
    rows = []
    for name, contestant in contestants.items():
        rate, peak = times.rate(name), peak_bytes(contestant.call)
        found = {"what": name, "threads": number, "items_per_second": rate.median, "low": rate.low, "high": rate.high}
        rows.append({**found, "peak_mib": None if peak is None else peak / 2**20})
    return rows


if __name__ == "__main__":
    main()
