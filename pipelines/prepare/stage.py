"""The stage's body: open the configured source, and make the partitions that the store lacks."""

from sidestack.infra.stage import StageRun
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.dataset import write_dataset
from sidestack.pipelines.prepare.remote import fetch_source_to_nodes


def prepare(run: StageRun[PrepareConfig]) -> None:
    """Write the snapshot of the configured source into the stage's output, and the partitions it lacks into the store.

    Raises:
        ConfigError: the source's package or directory is missing. DataError: a source breaks the contract.
    """
    fetch_source_to_nodes(run.config.source, run.world)
    write_dataset(run, run.config.source.open(run))
