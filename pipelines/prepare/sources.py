"""The data sources. A new one is its module and an entry here, or a package that names it."""

import functools
from collections.abc import Mapping
from typing import Annotated

from infra.kinds import ByKind, models_by_kind
from infra.plugins import SOURCES
from pipelines.prepare.complete_journey.prepare import CompleteJourney
from pipelines.prepare.contract import SourceConfig
from pipelines.prepare.log.source import Log
from pipelines.prepare.synthetic import Synthetic
from pipelines.prepare.tables.source import Tables

OWN: Mapping[str, type[SourceConfig]] = {
    "complete_journey": CompleteJourney,
    "synthetic": Synthetic,
    "tables": Tables,
    "log": Log,
}


@functools.cache
def sources() -> Mapping[str, type[SourceConfig]]:
    """Return the sources' settings by kind: ours, and those of installed packages.

    Raises:
        ConfigError: an installed package names what is no source's settings; see `models_by_kind`.
    """
    return models_by_kind(SOURCES, SourceConfig, OWN)


AnySource = Annotated[SourceConfig, ByKind(sources)]
"""The settings of any source, as a field of a configuration."""
