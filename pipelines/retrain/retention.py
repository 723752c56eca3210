"""Privacy's retention, kept after each cycle: what is older is deleted from the store, and said."""

from pathlib import Path

from sidestack.infra.snapshot import read_dataset
from sidestack.infra.store import Store
from sidestack.pipelines.job_log import say
from sidestack.pipelines.privacy.expire import expire, retained_since


def delete_expired(prepared: Path) -> None:
    """Delete what `prepare.source.privacy.retention_days` no longer lets a raw log's store hold.

    Snapshots of earlier cycles stay, and name partitions that are gone: a retention that kept what they list would
    keep all. Rankers and encoders do not need them.

    Args:
        prepared: the newest snapshot of `prepare`.
    """
    since = retained_since(prepared)
    if since is None:
        return
    found = expire(Store(read_dataset(prepared).store), since)
    if found.deleted or found.shortened:
        say("retrain", next(iter(found.lines())))
