"""The stage's body: open the source of the configured kind, and make what the store lacks of it."""

from infra.stage import StageRun
from pipelines.prepare.complete_journey.prepare import open_complete_journey
from pipelines.prepare.config import CompleteJourney, PrepareConfig, Synthetic, Tables
from pipelines.prepare.dataset import write_dataset
from pipelines.prepare.log.source import open_log
from pipelines.prepare.remote import bring_source_to_nodes
from pipelines.prepare.synthetic import SyntheticLog
from pipelines.prepare.tables import open_tables


def prepare(run: StageRun[PrepareConfig]) -> None:
    """Write the snapshot of the configured source into the stage's output, and the partitions it lacks into the store.

    Raises:
        ConfigError: the source's package or directory is not there. DataError: a source breaks the contract.
    """
    bring_source_to_nodes(run.config, run.world)
    match run.config.source:
        case CompleteJourney() as source:
            write_dataset(run, open_complete_journey(run, source))
        case Synthetic() as source:
            write_dataset(run, SyntheticLog(source, run.config.as_of))
        case Tables() as source:
            write_dataset(run, open_tables(run, source))
        case source:
            write_dataset(run, open_log(run, source))
