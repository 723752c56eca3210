"""The metrics, in the order in which tables show them. One entry here is all that a metric needs, or, in another
package, an entry point of group `sidestack.metrics` (docs/extending).

Summaries, comparisons, intervals, tables and tuning ask `all_metrics` for what there is; none of them names a metric.
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
"""How rows come to a tally: by row number, by (score, row), or by (user, score)."""


@dataclass(frozen=True)
class Metric:
    """How well an arm predicts one task, in one number.

    Attributes:
        name: its key in files, and its column. title: its name for people.
        tally: number of the task's users -> what sums it up over rows.
        order: how the tally's rows must come.
        better: which values are better; None where neither is, so that there is no gain.
        digits: decimals shown.
        note: what must be known of it; shown below tables, with the counts of its `Measure`.
    """

    name: str
    title: str
    tally: Callable[[int], Tally]
    order: Order = "row"
    better: Better | None = None
    digits: int = 4
    note: str = ""

    def text(self, value: float | None) -> str:
        """Return a value as people read it; nothing where it is not defined."""
        return "" if value is None else f"{value:.{self.digits}f}"

    def gain_rule(self, reference: str) -> str:
        """Say how the gain over a reference is made."""
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
"""The metric whose gain tables, figures, segments, RoI and tuning are about."""


@functools.cache
def all_metrics() -> dict[str, Metric]:
    """Return the metrics by name, ours and after them those of installed packages.

    They are loaded by the first call and not when this module is imported: the module of a metric may then be imported
    before it.

    Raises:
        ConfigError: an installed package names what is no metric; see `with_plugins`.
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
