"""What is older than the retention is deleted, and said."""

from datetime import timedelta

from pipelines.launch import say
from pipelines.retrain.ledger import Ledger


def expire(ledger: Ledger, days: int) -> None:
    """Delete the partitions of dates older than so many days before the newest.

    Args:
        ledger: the record. days: the retention.
    """
    last = ledger.trained
    if last is None or last.plan.newest is None:
        return
    before = last.plan.newest - timedelta(days=days - 1)
    say("retrain", f"retention: {before}")
