"""Check the licences of installed distributions against a list in which every exception has a reason."""

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from importlib.metadata import Distribution
from pathlib import Path
from typing import Annotated, NamedTuple

import yaml
from pydantic import Field

from sidestack.infra.config import Config, parse
from sidestack.infra.errors import ConfigError

Reason = Annotated[str, Field(min_length=10)]


class Exemption(Config):
    """A distribution that is accepted although its licence is not allowed, or is missing from its metadata."""

    licence: str
    """Its licence."""
    why: Reason
    """Why it is accepted nevertheless."""


class Policy(Config):
    """The content of `requirements/licences.yaml`."""

    allowed: tuple[str, ...]
    """SPDX identifiers, with their exceptions (`WITH`)."""
    called: dict[str, str]
    """Licence name in metadata -> SPDX identifier."""
    exceptions: dict[str, Exemption]
    """By distribution name; * matches anything."""
    advisories: dict[str, Reason]
    """Advisory id -> why it does not concern us."""


class Finding(NamedTuple):
    """One distribution's licence.

    Attributes:
        name, version: the distribution's. licence: as in its metadata; as an SPDX expression where that is known.
        is_allowed: whether it may be installed. why: the reason of an exception.
    """

    name: str
    version: str
    licence: str
    is_allowed: bool
    why: str


def read_policy(file: Path) -> Policy:
    """Read the list.

    Raises:
        ConfigError: it cannot be read, or breaks its rules, such as an exception without a reason.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    return parse(Policy, values, str(file))


def check_licences(found: Iterable[Distribution], policy: Policy) -> Iterator[Finding]:
    """Yield the finding for every distribution, by name."""
    for one in sorted(found, key=lambda one: str(one.name).lower()):
        licence = licence_of(one, policy)
        exemption = next((made for name, made in policy.exceptions.items() if _matches(name, one.name)), None)
        if is_allowed(licence, policy):
            yield Finding(one.name, one.version, licence, True, "")
        elif exemption is not None:
            yield Finding(one.name, one.version, exemption.licence, True, exemption.why)
        else:
            yield Finding(one.name, one.version, licence or "not named", False, "")


def unused(found: Iterable[Finding], policy: Policy) -> list[str]:
    """Return the exceptions that no distribution needs, except those with a *, which may be for another platform."""
    needed = {name for one in found if one.why for name in policy.exceptions if _matches(name, one.name)}
    return sorted(name for name in policy.exceptions if name not in needed and "*" not in name)


def licence_of(one: Distribution, policy: Policy) -> str:
    """Return the SPDX expression of a distribution: its own, else one derived from its classifiers or licence text."""
    metadata = one.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or () if "License ::" in line]
    text = metadata["License"].strip() if "License" in metadata else ""
    named = [*classifiers, *([text] if len(text.splitlines()) == 1 else [])]
    known = [policy.called.get(name, name) for name in named]
    return next((name for name in known if is_allowed(name, policy)), known[0] if known else "")


def is_allowed(expression: str, policy: Policy) -> bool:
    """Return whether allowed licences satisfy an SPDX expression; one with brackets always needs an exception."""
    choices = re.split(r"\s+OR\s+", expression)
    return any(all(part in policy.allowed for part in re.split(r"\s+AND\s+", choice)) for choice in choices)


def _matches(pattern: str, name: str) -> bool:
    return fnmatch(re.sub(r"[-_.]+", "-", name).lower(), pattern)
