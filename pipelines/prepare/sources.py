"""The data sources. A new source needs a module and an entry here, or an installed package that registers it."""

import functools
from collections.abc import Mapping
from typing import Annotated

from sidestack.infra.kinds import ByKind, models_by_kind
from sidestack.infra.plugins import SOURCES
from sidestack.pipelines.prepare.complete_journey.prepare import CompleteJourney
from sidestack.pipelines.prepare.contract import SourceConfig
from sidestack.pipelines.prepare.log.source import Log
from sidestack.pipelines.prepare.synthetic import Synthetic
from sidestack.pipelines.prepare.tables.source import Tables

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
        ConfigError: an installed package registers something that is not a source's settings; see `models_by_kind`.
    """
    return models_by_kind(SOURCES, SourceConfig, OWN)


AnySource = Annotated[SourceConfig, ByKind(sources)]
"""The settings of any source, as a field of a configuration."""
