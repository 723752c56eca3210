"""What tells a prepare stage's source from itself at another time, so that the stage's key is of the data."""

from typing import Any

from infra.config import digest
from infra.identity import Ledger
from infra.tables import SPEC_FILE, read_json
from pipelines.prepare.complete_journey.source import RawFiles
from pipelines.prepare.config import LEDGER, CompleteJourney, PrepareConfig, Synthetic
from pipelines.prepare.log.config import Log
from pipelines.prepare.log.files import raw_files
from pipelines.prepare.log.masking import masking_of
from pipelines.prepare.remote import bring_source
from pipelines.prepare.tables import log_files


def source_identity(config: PrepareConfig) -> str:
    """Return a digest of the files that the source is made of: of their names, and what identifies each.

    Raises:
        ConfigError: the source's package is not installed, or the key of masked ids is not there. DataError: a file is
            missing or cannot be identified.
    """
    bring_source(config)
    ledger = config.cache_dir / LEDGER
    match config.source:
        case Synthetic():
            return "made from its settings alone"
        case CompleteJourney():
            files = Ledger(ledger).identities(RawFiles.installed().paths)
            return digest({path.name: identity for path, identity in files.items()})
        case Log() as source:
            raw, masking = raw_files(source, ledger), masking_of(source.privacy)
            key: dict[str, Any] = {} if masking is None else {"key": masking.key_id}
            return digest(
                key | {name: sorted(raw.identity[file] for file in files) for name, files in raw.tables.items()}
            )
        case source:
            found = log_files(source, config.as_of, ledger)
            names = {str(path.relative_to(source.path)): found.identity[path] for path in found.all()}
            return digest({"files": names, "spec": read_json(source.path / SPEC_FILE)})
