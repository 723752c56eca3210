"""Kinds that other packages add: quantizers, content kinds, metrics, data sources.

A package declares them as entry points of a group; they are available once it is installed (docs/extending):

    [project.entry-points."sidestack.quantizers"]
    rotated = "my_package.rotated:RotatedConfig"
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from sidestack.infra.errors import ConfigError

T = TypeVar("T")

QUANTIZERS = "sidestack.quantizers"
CONTENTS = "sidestack.contents"
METRICS = "sidestack.metrics"
SOURCES = "sidestack.sources"


def with_plugins(group: str, own: Mapping[str, T]) -> dict[str, T]:
    """Return our kinds by name, followed by those of installed packages.

    Args:
        group: the entry points' group. own: the kinds of this package.

    Raises:
        ConfigError: two kinds have one name, or an entry point cannot be loaded; the message names the package.
    """
    kinds = dict(own)
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        place = f"entry point {entry.name!r} of group {group!r} (package {entry.dist.name if entry.dist else '?'})"
        if entry.name in kinds:
            raise ConfigError(f"{place}: the name is taken")
        try:
            kinds[entry.name] = entry.load()
        except Exception as error:  # foreign code may raise anything; the error must name its package
            raise ConfigError(f"{place}: cannot be loaded: {type(error).__name__}: {error}") from error
    return kinds
