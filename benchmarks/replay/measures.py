"""Summary of a replay's cycles: one line per policy, and the part of a cycle's cost that grows with the log."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from sidestack.benchmarks.record import Row

CONTROL = "never"
"""The policy that gains are relative to."""
TASKS = ("click", "conversion")


def served(row: Row, task: str) -> float | None:
    """Return the champion's normalized entropy on the data that a cycle judges, before training on it."""
    value: float | None = row["figures"].get(f"champion_{task}_ne")
    return value


def of_policy(rows: Sequence[Row], policy: str) -> list[Row]:
    """Return a policy's cycles after the first champion's, in order."""
    return [row for row in rows if row["policy"] == policy and row["cycle"] > 1]


def gains(rows: Sequence[Row], policy: str, task: str) -> dict[str, float]:
    """Return, by a cycle's last date, the relative reduction of served NE by a policy against the control."""
    control = {row["newest"]: served(row, task) for row in of_policy(rows, CONTROL)}
    found = {}
    for row in of_policy(rows, policy):
        own, other = served(row, task), control.get(row["newest"])
        if own is not None and other:
            found[row["newest"]] = 1 - own / other
    return found


def last_half(values: Sequence[float]) -> Sequence[float]:
    """Return the later half, including the middle value."""
    return values[len(values) // 2 :]


class Mean(NamedTuple):
    """A mean over cycles and its standard error, which is None for fewer than two."""

    mean: float
    error: float | None


def mean_of(values: Sequence[float]) -> Mean | None:
    """Return the mean of some values; None if there are none."""
    if not values:
        return None
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Mean(float(np.mean(values)), error)


def summary(rows: Sequence[Row], policy: str, run_bytes: int) -> dict[str, Any]:
    """Return a policy's line; NE, gains and SIDs are over the last half of its cycles."""
    own = of_policy(rows, policy)
    line: dict[str, Any] = {"policy": policy}
    for task in TASKS:
        value = mean_of(last_half([ne for row in own if (ne := served(row, task)) is not None]))
        gain = mean_of(last_half(list(gains(rows, policy, task).values()))) if policy != CONTROL else None
        line[f"{task}_ne"] = value.mean if value else None
        line[f"{task}_gain"], line[f"{task}_error"] = gain or (None, None)
    moved = mean_of([share for row in own if (share := sids_changed(row)) is not None])
    return {
        **line,
        "promoted": sum(row["promoted"] for row in own),
        "cycles": len(own),
        "sids_changed": moved.mean if moved else None,
        "cpu_seconds": float(np.mean([sum(row["cpu_seconds"].values()) for row in own])),
        "bytes": run_bytes,
    }


def sids_changed(row: Row) -> float | None:
    """Return the share of the previously known items whose SID has changed in some digit."""
    shares = {
        int(name.rsplit(".", 1)[1]): value
        for name, value in row["figures"].items()
        if name.startswith("sid_changed_share.sid.")
    }
    return shares[max(shares)] if shares else None


class Growth(NamedTuple):
    """CPU seconds of a cycle as `fixed + a_row_learned * rows_learned + a_row_log * rows_log`.

    Attributes:
        stage: the stage's name. fixed, a_row_learned, a_row_log: the terms, none negative. seconds: the mean.
        share: the share of the last cycle's seconds that does not grow with the log.
    """

    stage: str
    fixed: float
    a_row_learned: float
    a_row_log: float
    seconds: float
    share: float

    def at(self, row: Row) -> float:
        """Return the fitted seconds of a cycle."""
        return float(self.fixed + self.a_row_learned * row["rows_learned"] + self.a_row_log * row["rows_log"])


ALL = "all stages"


def growth(rows: Sequence[Row], policy: str) -> list[Growth]:
    """Fit the cost of a policy's cycles by stage, and of all stages together (the last).

    Least squares without negative terms, because no row takes negative time. Weeks have about the same size, so the
    cost of a week's own rows is in the fixed part. The rows learned are separate: after a rejection they span weeks.
    """
    own = of_policy(rows, policy)
    stages = list(dict.fromkeys(stage for row in own for stage in row["cpu_seconds"]))
    by_stage = {stage: [row["cpu_seconds"].get(stage, 0.0) for row in own] for stage in stages}
    by_stage[ALL] = [sum(row["cpu_seconds"].values()) for row in own]
    return [_fitted(stage, own, seconds) for stage, seconds in by_stage.items()]


def _fitted(stage: str, rows: Sequence[Row], seconds: Sequence[float]) -> Growth:
    x_N3 = np.array([[1.0, row["rows_learned"], row["rows_log"]] for row in rows])
    scale_3 = np.maximum(x_N3.max(axis=0), 1.0)
    terms_3 = nnls(x_N3 / scale_3, np.array(seconds))[0] / scale_3
    parts_3 = terms_3 * x_N3[-1]
    total = float(parts_3.sum())
    fixed, learned, log = (float(term) for term in terms_3)
    return Growth(stage, fixed, learned, log, float(np.mean(seconds)), 1 - float(parts_3[2]) / total if total else 1.0)


def best(lines: Sequence[Mapping[str, Any]], task: str) -> Mapping[str, Any]:
    """Return the line of the lowest served NE."""
    return min((line for line in lines if line[f"{task}_ne"] is not None), key=lambda line: float(line[f"{task}_ne"]))
