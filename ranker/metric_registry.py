"""The metrics, in the order in which tables show them. A metric needs only one entry here, or, in another package, an
entry point of group `sidestack.metrics` (docs/extending).

Summaries, comparisons, intervals, tables and tuning use `all_metrics`; none of them names a metric.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from sidestack.infra.errors import ConfigError
from sidestack.infra.plugins import METRICS, with_plugins
from sidestack.ranker.statistics import AucTally, GaucTally, RowTally, Tally, entropy_of_base_rate, log_loss

Better = Literal["lower", "higher"]
Order = Literal["row", "score", "user"]
"""The order of a tally's rows: by row number, by (score, row), or by (user, score)."""


@dataclass(frozen=True)
class Metric:
    """How well an arm predicts one task, in one number.

    Attributes:
        name: its key in files, and its column. title: its display name.
        tally: number of the task's users -> the tally that sums the metric over rows.
        order: the order that the tally's rows must have.
        better: which values are better; None if neither, so that there is no gain.
        digits: decimals shown.
        note: a footnote, shown below tables with the counts of its `Measure`.
    """

    name: str
    title: str
    tally: Callable[[int], Tally]
    order: Order = "row"
    better: Better | None = None
    digits: int = 4
    note: str = ""

    def text(self, value: float | None) -> str:
        """Return a value as text; empty if it is not defined."""
        return "" if value is None else f"{value:.{self.digits}f}"

    def gain_rule(self, reference: str) -> str:
        """Return the formula of the gain over a reference, as text."""
        ratio = f"{self.title} / {self.title}({reference})"
        return f"{self.title} gain is 1 - {ratio}" if self.better == "lower" else f"{self.title} gain is {ratio} - 1"


NE = Metric(
    "ne",
    "NE",
    partial(RowTally, value=log_loss, scale=entropy_of_base_rate),
    better="lower",
)
"""Normalized entropy (SIDE paper, Eq. 7): mean log loss over the entropy of the base rate; below 1 is better than
always predicting the base rate."""

AUC = Metric("auc", "AUC", AucTally, order="score", better="higher")

GAUC = Metric("gauc", "GAUC", GaucTally, order="user", better="higher", note="AUC within users of both labels, by rows")

CALIBRATION = Metric(
    "calibration",
    "calibration",
    partial(
        RowTally,
        value=lambda labels_M, scores_M: scores_M.astype(np.float64),
        scale=lambda num, positives: float(positives) or None,
    ),
    digits=3,
    note="predicted positives over those that there were; 1 is right, 1.1 is a tenth too many",
)
"""Sum of predicted probabilities over number of positives; 1 is right."""

OWN = {metric.name: metric for metric in (NE, AUC, GAUC, CALIBRATION)}

HEADLINE = NE
"""The metric whose gain tables, figures, segments, RoI and tuning use."""


@functools.cache
def all_metrics() -> dict[str, Metric]:
    """Return the metrics by name, ours first, then those of installed packages.

    They are loaded by the first call, not at import of this module: a metric's module may be imported before this one.

    Raises:
        ConfigError: an installed package's entry point is not a metric; see `with_plugins`.
    """
    metrics = with_plugins(METRICS, OWN)
    for name, metric in metrics.items():
        if not isinstance(metric, Metric) or metric.name != name:
            raise ConfigError(
                f"entry point {name!r} of group {METRICS!r}: must name a ranker.metric_registry.Metric of that name,"
                f" is {metric!r}"
            )
    return metrics


def compared_metrics() -> tuple[Metric, ...]:
    """Return the metrics that have a gain."""
    return tuple(metric for metric in all_metrics().values() if metric.better is not None)
