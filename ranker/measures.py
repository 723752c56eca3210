"""All metrics of one arm on one task, from its sorted predictions."""

from dataclasses import dataclass

from sidestack.ranker.metric_registry import Order, all_metrics
from sidestack.ranker.predictions import Predictions
from sidestack.ranker.statistics import Decile, DecileTally, Measure


@dataclass(frozen=True)
class TaskMeasures:
    """How well one arm predicts one task.

    Attributes:
        num: judged rows. positives: those with label 1.
        metrics: by name, in the order of `all_metrics`.
        deciles: calibration by predicted probability, lowest first.
    """

    num: int
    positives: int
    metrics: dict[str, Measure]
    deciles: tuple[Decile, ...]


def measure_task(predictions: Predictions, task: str) -> TaskMeasures:
    """Measure every metric on the rows that are judged on a task, in one pass for each order of rows."""
    num_users = len(predictions.users(task))
    num, positives = predictions.count_labels(task)
    tallies = {name: metric.tally(num_users) for name, metric in all_metrics().items()}
    deciles = DecileTally(num)
    orders: tuple[Order, ...] = ("row", "score", "user")
    for order in orders:
        takers = [tallies[name] for name, metric in all_metrics().items() if metric.order == order]
        for rows in predictions.judged(task, order):
            for tally in takers:
                tally.add(rows)
            if order == "score":
                deciles.add(rows)
    return TaskMeasures(num, positives, {name: one.measure() for name, one in tallies.items()}, deciles.deciles())
