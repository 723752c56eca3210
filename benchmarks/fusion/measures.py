"""From held-out losses to the tables' rows: the effect of fusion by signal, over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sidestack.benchmarks.fusion.training import FUSION, ONE_EACH, Training, read_summary

Row = dict[str, Any]

PAPER_SIGNALS = ("image", "text")
PAPER = {
    (ONE_EACH, "rq"): (0.1995, 0.3066),
    (ONE_EACH, "dpca"): (0.1870, 0.2319),
    (ONE_EACH, "fsq"): (0.1549, 0.2435),
    (FUSION, "rq"): (0.2224, 0.2892),
    (FUSION, "dpca"): (0.1945, 0.2365),
    (FUSION, "fsq"): (0.2161, 0.2803),
}
"""Table 1 of the paper: cosine losses of its two signals at 24 bits, by setting and method."""


def plan(methods: Sequence[str], weights: Mapping[str, float], seeds: int, corpus: Path) -> dict[Training, str]:
    """Return the trainings of one table: for every method and seed, one encoder per signal and one of all signals.

    Args:
        methods: names of `METHODS`.
        weights: the signals and the weights of their losses when fused; alone, a signal has weight 1.
        seeds: number of seeds, counted from 0.
        corpus: the dataset that all are trained on.

    Returns:
        training -> its setting, such as fusion.
    """
    trainings = {}
    for method in methods:
        for seed in range(seeds):
            for name in weights:
                trainings[Training(method, ((name, 1.0),), seed, corpus)] = ONE_EACH
            trainings[Training(method, tuple(weights.items()), seed, corpus)] = FUSION
    return trainings


def rows_of(table: str, settings: Mapping[Training, str], outputs: Mapping[Training, Path]) -> list[Row]:
    """Measure one table: a row for each method, setting and signal.

    Args:
        table: its name, which is in every row.
        settings: see `plan`. outputs: each training's committed directory.

    Returns:
        rows of `loss` (mean over seeds) and `losses` (each seed's), `spread` (standard deviation; None for one
        seed), for categoricals `top1`; for fusion also `change` and `change_spread`, the relative change of the loss
        against `1:1` with the same seed; `seconds` of one training, without its start.
    """
    found: dict[tuple[str, str, str], list[Row]] = {}
    for training, setting in settings.items():
        summary = read_summary(outputs[training])
        for name, measured in summary["holdout"]["signals"].items():
            seconds = {"seed": training.seed, "seconds": summary["seconds"]}
            found.setdefault((training.method, setting, name), []).append({**measured, **seconds})
    return [_row(table, key, runs, found) for key, runs in found.items()]


def _row(
    table: str, key: tuple[str, str, str], runs: list[Row], found: Mapping[tuple[str, str, str], list[Row]]
) -> Row:
    method, setting, name = key
    losses = [run["loss"] for run in runs]
    row: Row = {
        "table": table, "method": method, "setting": setting, "signal": name, "loss": fmean(losses),
        "spread": spread(losses), "losses": losses, "seconds": fmean(run["seconds"] for run in runs),
    }  # fmt: skip
    if "top1" in runs[0]:
        row["top1"] = fmean(run["top1"] for run in runs)
    if setting == FUSION:
        alone = {run["seed"]: run["loss"] for run in found[method, ONE_EACH, name]}
        changes = [run["loss"] / alone[run["seed"]] - 1 for run in runs if alone[run["seed"]] > 0]
        row["change"] = fmean(changes) if changes else None
        row["change_spread"] = spread(changes)
    return row


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; None for fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def paper_rows() -> list[Row]:
    """Return the paper's Table 1 in the form of our rows."""
    rows = []
    for (setting, method), losses in PAPER.items():
        for position, name in enumerate(PAPER_SIGNALS):
            row: Row = {
                "table": "paper", "method": method, "setting": setting, "signal": name, "loss": losses[position],
            }  # fmt: skip
            if setting == FUSION:
                row["change"] = losses[position] / PAPER[ONE_EACH, method][position] - 1
            rows.append(row)
    return rows
