"""The stage's body: open the configured source, and make what the store lacks of it."""

from infra.stage import StageRun
from pipelines.prepare.config import PrepareConfig
from pipelines.prepare.dataset import write_dataset


def prepare(run: StageRun[PrepareConfig]) -> None:
    """Write the snapshot of the configured source into the stage's output, and the partitions it lacks into the store.

    Raises:
        ConfigError: the source's package or directory is not there. DataError: a source breaks the contract.
    """
    write_dataset(run, run.config.source.open(run))
