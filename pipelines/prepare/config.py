"""Configuration of the prepare stage: the source, and its conversion to the contract's tables."""

from typing import Any

from sidestack.pipelines.prepare.complete_journey.prepare import CompleteJourney
from sidestack.pipelines.prepare.contract import Prepare
from sidestack.pipelines.prepare.remote import fetch_source
from sidestack.pipelines.prepare.sources import AnySource


class PrepareConfig(Prepare):
    """Settings of the prepare stage: a source, and a cache of its embeddings."""

    source: AnySource = CompleteJourney()

    def data_identity(self) -> str:
        """Return the identity of the files that the source reads; see `SourceConfig.data_identity`."""
        fetch_source(self.source)
        return self.source.data_identity(self)

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the tables: all but the embedding cache's path and the query engine."""
        return {**self.model_dump(mode="json", exclude={"cache_dir", "source"}), "source": self.source.identity()}
