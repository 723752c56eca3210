"""Privacy retention after each cycle: expired data is deleted from the store, and the deletion is logged."""

from pathlib import Path

from sidestack.infra.snapshot import read_dataset
from sidestack.infra.store import Store
from sidestack.pipelines.job_log import log_line
from sidestack.pipelines.privacy.expire import expire, retained_since


def delete_expired(prepared: Path) -> None:
    """Delete what exceeds `prepare.source.privacy.retention_days` from a raw log's store.

    Snapshots of earlier cycles stay and list deleted partitions: keeping what they list would keep everything. Rankers
    and encoders do not need these partitions.

    Args:
        prepared: the newest snapshot of `prepare`.
    """
    since = retained_since(prepared)
    if since is None:
        return
    found = expire(Store(read_dataset(prepared).store), since)
    if found.deleted or found.shortened:
        log_line("retrain", next(iter(found.lines())))
