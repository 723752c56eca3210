"""A metric: the Brier score, the mean squared difference between probability and label."""

from functools import partial

from sidestack.ranker.metric_registry import Metric
from sidestack.ranker.statistics import RowTally

BRIER = Metric(
    "brier",
    "Brier score",
    partial(
        RowTally,
        value=lambda labels_M, scores_M: (scores_M - labels_M) ** 2,
        scale=lambda num, positives: float(num) or None,
    ),
    better="lower",
    note="mean squared difference between probability and label",
)
