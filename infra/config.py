"""Configuration: frozen pydantic models, one YAML file a run, dotted overrides, unknown keys refused."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration model: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)

SECTIONS = ("prepare", "encoder", "encoders", "materialize", "export", "ranker", "tune", "compare", "tables", "run")
"""The sections a run's file may have: one for each kind of stage, `encoders` for further encoders, `tables` for which
arms are held against each other, and `run` for how the stages are launched."""


def load_file(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a run's YAML file and apply dotted overrides.

    Args:
        path: the YAML file, a mapping of sections.
        overrides: texts like ``encoder.training.epochs=2``; the value is parsed as YAML.

    Returns:
        The sections as plain dictionaries.

    Raises:
        ConfigError: the file is missing, is no mapping, has an unknown section, or an override is malformed.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: must be a mapping of sections, is {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    unknown = sorted(set(values) - set(SECTIONS))
    if unknown:
        raise ConfigError(f"config {path}: unknown section {unknown[0]!r}; known are {', '.join(SECTIONS)}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {override!r}: must look like section.key=value")
    node = values
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {key!r} is a value, not a mapping")
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error


def parse(cls: type[C], values: Mapping[str, Any] | None, where: str) -> C:
    """Validate `values` as `cls`.

    Args:
        cls: the configuration model.
        values: plain data as read from YAML; None counts as empty.
        where: what the messages call this place, such as ``config.yaml: encoder``.

    Raises:
        ConfigError: one line for each fault, with dotted key, value and rule.
    """
    try:
        return cls.model_validate(dict(values or {}))
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            key = ".".join(str(part) for part in fault["loc"]) or "(whole)"
            # The rule of a whole mapping names what it is about itself; the mapping would drown it.
            is_whole = fault["type"] == "missing" or isinstance(fault["input"], Mapping)
            shown = "" if is_whole else f" (value: {_short(fault['input'])})"
            rule = "unknown key" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
            lines.append(f"{where}.{key}: {rule}{shown}")
        raise ConfigError("\n".join(lines)) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def load_section(cls: type[C], path: Path, section: str, overrides: Sequence[str] = ()) -> C:
    """Read one section of a run's file; an absent section means all defaults.

    Raises:
        ConfigError: see `load_file` and `parse`.
    """
    return parse(cls, load_file(path, overrides).get(section), f"{Path(path).name}: {section}")


def plain(value: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Give the value as JSON-ready plain data."""
    return value.model_dump(mode="json") if isinstance(value, Config) else dict(value)


def digest(value: Config | Mapping[str, Any]) -> str:
    """Give the SHA-256 (hex) of the value's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_yaml(value: Config | Mapping[str, Any]) -> str:
    """Give the resolved configuration as YAML, to be saved beside every output."""
    return yaml.safe_dump(plain(value), sort_keys=False, default_flow_style=None, width=100)
