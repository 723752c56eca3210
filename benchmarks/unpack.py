"""Ids per second of SIDE's unpacking and of the codec, compared with the time to write their output.

`python -m benchmarks.unpack [--quick] [--out DIR]`. Ids of 15 ternary digits.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidestack.benchmarks.goals import goal, publish
from sidestack.benchmarks.record import results_folder
from sidestack.benchmarks.timing import Contestant, Spread, Times, take_turns, thread_numbers, threads
from sidestack.encoder.sid.spec import SidSpec
from sidestack.ranker.contents.side import SidUnpack

SPEC = SidSpec(
    quantizer="structured", levels=3, digits=15, depth=5, groups=3, steps=tuple(0.5**i for i in range(15)),
    fingerprint="none",
)  # fmt: skip
BATCH, TABLE = 1 << 16, 1 << 20
"""Number of ids of a training batch (2,048 rows with histories of 32), and of a table's column."""
COLUMNS = {"what": "", "ids": ",d", "threads": "d", "ids_per_second": ",.0f", "low": ",.0f", "high": ",.0f"}
WORDS = """
Ids of 15 ternary digits to the centred float32 digits that SIDE takes (60 bytes an id), and by the codec to bytes and
to int64. "write" allocates the same output and fills it with a constant: whoever gives it has to do that. A batch's
output is in the cache and its memory is used again, so writing it costs next to nothing; a table's column is written
to fresh memory. "division" is the readable way, a division and a remainder a digit. The look-up works in one thread.
"""
RATE_GOAL, WRITE_GOAL = 40e6, 1 / 1.5


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unpack", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    parser.add_argument("--out", type=Path, help="where unpack.json and unpack.md go")
    arguments = parser.parse_args()
    out = results_folder(arguments.out, quick=arguments.quick)
    rows: list[dict[str, Any]] = []
    for number in thread_numbers():
        with threads(number), torch.inference_mode():
            for ids in (BATCH, TABLE):
                rows += measured(ids, 3 if arguments.quick else 25, number)
    publish("unpack", "Unpacking speed", WORDS, rows, COLUMNS, out=out)


def measured(ids: int, rounds: int, number: int) -> list[dict[str, Any]]:
    """Measure one number of ids with one number of threads."""
    sids_N1 = torch.randint(3**15, (ids, 1), generator=torch.Generator().manual_seed(0))
    known_N = torch.rand(ids, generator=torch.Generator().manual_seed(1)) < 0.95
    side = SidUnpack(SPEC, scale_steps=True)
    # Each is paired with writing its own output: allocations in between decide whether memory is reused.
    pairs: list[dict[str, Callable[[], object]]] = [
        {"SIDE": lambda: side(sids_N1, known_N), "write float32": lambda: _written(ids, torch.float32)},
        {"codec, uint8": lambda: SPEC.unpack(sids_N1, torch.uint8), "write uint8": lambda: _written(ids, torch.uint8)},
        {"codec, int64": lambda: SPEC.unpack(sids_N1), "write int64": lambda: _written(ids, torch.int64)},
        {"SIDE, by division": lambda: by_division(sids_N1[:, 0])},
    ]
    repeats = max(TABLE // ids, 1)
    rows = []
    for calls in pairs:
        contestants = {name: Contestant(_repeated(call, repeats), ids * repeats) for name, call in calls.items()}
        times = take_turns(contestants, rounds)
        rows += [{"what": name, "ids": ids, "threads": number, **_rate(times, name)} for name in contestants]
        if "SIDE" in calls and number == 1:
            rows += _goals(times, ids)
    return rows


def _written(ids: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(ids, 15, dtype=dtype).fill_(1)


def by_division(ids_N: Tensor) -> Tensor:
    """Unpack in the readable way: one division and remainder per digit."""
    powers_D = torch.tensor([3**i for i in range(14, -1, -1)])
    return (ids_N[:, None] // powers_D % 3).float() - 1


def _repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    def repeat() -> None:
        for _ in range(times):
            call()

    return repeat


def _rate(times: Times, name: str) -> dict[str, float]:
    rate = times.rate(name)
    return {"ids_per_second": rate.median, "low": rate.low, "high": rate.high}


def _goals(times: Times, ids: int) -> list[dict[str, Any]]:
    share = Spread(*(value / RATE_GOAL for value in times.rate("SIDE")))
    writing = times.ratio("SIDE", "write float32")
    return [
        goal(f"SIDE / 40 M ids a second, {ids:,} ids", share, 1, 1),
        goal(f"SIDE / writing its output, {ids:,} ids", writing, WRITE_GOAL, 1),
    ]


if __name__ == "__main__":
    main()
