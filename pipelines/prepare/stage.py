"""The stage's body: dispatch on the source's kind, and sum up what was made."""

from infra.stage import StageRun
from pipelines.prepare.complete_journey.prepare import prepare_complete_journey
from pipelines.prepare.config import CompleteJourney, PrepareConfig, Synthetic
from pipelines.prepare.synthetic import prepare_synthetic
from pipelines.prepare.tables import prepare_tables


def prepare(run: StageRun[PrepareConfig]) -> None:
    """Write the dataset of the configured source into the stage's output.

    Raises:
        ConfigError: the source's package or directory is not there. DataError: a source breaks the contract.
    """
    match run.config.source:
        case CompleteJourney() as source:
            prepare_complete_journey(run, source)
        case Synthetic() as source:
            prepare_synthetic(run, source)
        case source:
            prepare_tables(run, source)
