"""Configuration: frozen pydantic models, one YAML file per run, dotted overrides; unknown and duplicate keys fail."""

import difflib
import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from sidestack.infra.errors import ConfigError, short
from sidestack.infra.kinds import ByKind
from sidestack.infra.remote.copies import read_bytes


class Config(BaseModel):
    """Base of every configuration model: immutable; unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def resolved(self) -> Self:
        """Return the configuration that a stage works with; its digest is computed from this alone.

        A section that holds alternatives returns the chosen one. Resolving twice changes nothing.
        """
        return self

    def identity(self) -> dict[str, Any]:
        """Return, as JSON-ready plain data, the settings that decide a stage's output: by default all of them.

        A section leaves out storage locations, so that a moved directory does not count as other work.
        """
        return self.model_dump(mode="json")


C = TypeVar("C", bound=Config)
Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""A seed that every generator accepts: torch's and numpy's, and those of faiss and scikit-learn, which have 32 bits."""
Days = Annotated[int, Field(gt=0, le=36_500)]
"""A number of days, at most a century, so that it can be added to any `Day`."""
Day = Annotated[date, Field(ge=date(1900, 1, 1), lt=date(2900, 1, 1))]
"""A date that microseconds in 64 bits can express, also after `Days` are added or subtracted."""


def matching(pattern: str, rule: str) -> AfterValidator:
    """Return a validator of text that must match a pattern as a whole; `rule` describes the pattern in words."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must be {rule}")
        return text

    return AfterValidator(check)


FileName = Annotated[
    str, matching(r"\w[\w.-]{0,99}", "of letters, digits, _, . and -, 100 at most, as directories are named after it")
]
"""A name that is used in names of files and directories."""


def is_inside(path: PurePath) -> bool:
    """Return whether a path leads below the directory it is joined to."""
    return not path.is_absolute() and ".." not in path.parts


def _require_inside(text: str) -> str:
    if not (text.isprintable() and is_inside(PurePosixPath(text))):
        raise ValueError("must be a relative path without .., as it names what lies below a directory")
    return text


Inside = Annotated[str, AfterValidator(_require_inside)]
"""A path that leads below the directory it is joined to."""

MAX_VALUES = 1_000_000
MAX_DEPTH = 32
"""Limits for a file of settings: values, and levels of nesting. A value counts each time that an alias repeats it."""

try:
    VERSION = importlib.metadata.version("sidestack")
    """The version of this code."""
except importlib.metadata.PackageNotFoundError:  # in a served model, which holds the code but not the installed package
    VERSION = "unknown"

SECTIONS = (
    "prepare", "encoder", "encoders", "materialize", "export", "ranker", "score", "ranker_export", "baseline", "tune",
    "compare", "tables", "drift", "judge", "retrain", "run",
)  # fmt: skip
"""The sections a run's file may have: one for each kind of stage, `encoders` for further encoders, `tables` for the
comparisons of arms, and `run` for how the stages are launched."""


def load_file(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a run's YAML file and apply dotted overrides.

    Args:
        path: the YAML file, a mapping of sections; None: only the overrides set sections.
        overrides: texts like ``encoder.training.epochs=2``; the value is parsed as YAML.

    Returns:
        The sections as plain dictionaries.

    Raises:
        ConfigError: the file is missing, not UTF-8, not a mapping, has a duplicate key or an unknown section; an
            override is malformed; or a value breaks a rule of `require_plain`.
    """
    where = "config" if path is None else f"config {path}"
    values = {} if path is None else read_mapping(path, where)
    for override in overrides:
        _apply(values, override)
    unknown = sorted(set(values) - set(SECTIONS), key=str)  # YAML has keys of several types
    if unknown:
        raise ConfigError(f"{where}: unknown section {unknown[0]!r}; known are {', '.join(SECTIONS)}")
    require_plain(values, where)
    return values


def read_mapping(path: Path, where: str) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: the file is missing, not UTF-8, not YAML, not a mapping, or has a duplicate key.
    """
    try:
        values = _load_yaml(read_bytes(Path(path)).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 (byte {error.start}: {error.reason})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be a mapping, is {type(values).__name__}")
    return values


def require_plain(values: Any, where: str) -> None:
    """Check that every stage can hash data from a file, write it as UTF-8 and hold it in 64 bits.

    Args:
        values: mappings, lists and scalars. where: the name of the file in messages.

    Raises:
        ConfigError: one line for each number that is not finite or needs more than 64 bits, each key that is not text,
            and each text with a NUL or half of a surrogate pair; or the data is too deep or too large.
    """
    faults, count = [], 0
    stack: list[tuple[tuple[object, ...], Any]] = [((), values)]
    while stack:  # not recursive: an alias may refer to a value that contains it
        path, value = stack.pop()
        count += 1
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"{where}: {_dotted(path[:3])}...: nested more than {MAX_DEPTH} levels deep")
        if count > MAX_VALUES:
            raise ConfigError(f"{where}: holds more than {MAX_VALUES:,} values")
        if rule := _scalar_fault(value):
            faults.append(f"{where}: {_dotted(path)}: {rule}")
        if isinstance(value, dict):
            faults += [f"{where}: {_dotted((*path, name))}: {rule}" for name in value if (rule := _key_fault(name))]
            stack += [((*path, name), one) for name, one in reversed(value.items())]
        elif isinstance(value, list | tuple | set):
            stack += [((*path, place), one) for place, one in reversed(list(enumerate(value)))]
    if faults:
        raise ConfigError("\n".join(faults))


def _dotted(path: Sequence[object]) -> str:
    text = ".".join(map(str, path)) or "(whole)"
    return text if text.isprintable() and len(text) <= 200 else short(text)


def _scalar_fault(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "needs more than 64 bits"
    if isinstance(value, str) and not _is_text(value):
        return f"{short(value)} has a NUL character or half of a surrogate pair"
    return ""


def _key_fault(name: object) -> str:
    if not isinstance(name, str):
        return f"the key {name!r} is of type {type(name).__name__}; put it in quotes if it is a name"
    return "" if _is_text(name) else "the key has a NUL character or half of a surrogate pair"


def _is_text(text: str) -> bool:
    return not any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in text)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with two more errors, both with line numbers.

    One is a duplicate key in a mapping: PyYAML keeps the last. The other is a scalar that Python cannot construct, such
    as 2024-13-01: PyYAML lets the constructor's own exception through.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read one mapping before merge keys are expanded: a key may override one from `<<`."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"key {key.value!r} occurs twice, on lines {lines[name]} and {line}")
            lines[name] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct the value of one node."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: {short(node.value)} is no {kind} ({error})") from error


def _load_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


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
        node[keys[-1]] = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def parse(cls: type[C], values: object, where: str) -> C:
    """Validate `values` as `cls`.

    Args:
        cls: the configuration model.
        values: plain data as read from YAML; must be a mapping; None counts as empty.
        where: the name of this place in messages, such as ``config.yaml: encoder``.

    Raises:
        ConfigError: one line for each fault, with dotted key, value and rule.
    """
    if not isinstance(values, Mapping | None):
        raise ConfigError(f"{where}: must be a mapping, is {type(values).__name__} (value: {short(values)})")
    try:
        return cls.model_validate(dict(values or {}))
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            if fault["type"] == "default_factory_not_called":  # caused by another field, whose fault is listed
                continue
            key = _dotted([part for part in fault["loc"] if part != "[key]"])
            # The message of a rule over a whole mapping names its subject; the mapping itself would be noise.
            is_whole = fault["type"] == "missing" or isinstance(fault["input"], Mapping)
            shown = "" if is_whole else f" (value: {short(fault['input'], 80)})"
            rule = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                rule = f"unknown key{suggestion(str(fault['loc'][-1]), _known_keys(cls, fault['loc'][:-1]))}"
            lines.append(f"{where}.{key}: {rule}{shown}")
        raise ConfigError("\n".join(lines)) from error


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a message suffix that names the known word closest to a misspelt one; empty where none is close."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _known_keys(cls: type[BaseModel], place: Sequence[int | str]) -> set[str]:
    """Return the keys that the models at a place below `cls` may have."""
    models = {cls}
    for part in place:
        fields = (model.model_fields.get(str(part)) for model in models)
        inner = {one for field in fields if field is not None for one in _inner_models(field)}
        models = inner or models  # a dictionary key or a list index: the same models apply to its value
    return {name for model in models for name in model.model_fields}


def _inner_models(field: FieldInfo) -> Iterator[type[BaseModel]]:
    """Yield the models that a field may hold: those in its annotation, and those of its kinds."""
    yield from _models(field.annotation)
    for note in field.metadata:
        if isinstance(note, ByKind):
            yield from note.kinds().values()


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in an annotation, such as `dict[str, Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def load_section(cls: type[C], path: Path | None, section: str, overrides: Sequence[str] = ()) -> C:
    """Read one section of a run's file; an absent section, or no file, means all defaults.

    Raises:
        ConfigError: see `load_file` and `parse`.
    """
    where = section if path is None else f"{Path(path).name}: {section}"
    return parse(cls, load_file(path, overrides).get(section), where)


def parse_written(cls: type[C], values: object, where: str, version: str | None) -> C:
    """Validate JSON data that some version of sidestack wrote; a missing field takes its default.

    Args:
        cls: the configuration model.
        values: the data.
        where: the name of this place in messages.
        version: the version that wrote the data; None where it is unknown.

    Raises:
        ConfigError: see `parse`; the message also names the versions that wrote and read the data.
    """
    try:
        if values is None:
            raise ConfigError(f"{where}: must be a mapping, is null")
        return parse(cls, values, where)
    except ConfigError as error:
        writer = f"sidestack {version}" if version else "an unknown version of sidestack"
        raise ConfigError(f"{error}\n{where}: was written by {writer}, this is sidestack {VERSION}") from error


def plain(value: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Return the value as JSON-ready plain data."""
    return value.model_dump(mode="json") if isinstance(value, Config) else dict(value)


def digest(value: Config | Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of the canonical JSON (sorted keys, no spaces) of a configuration's identity.

    Args:
        value: a resolved configuration, or JSON-ready plain data, which is hashed as it is.
    """
    values = value.identity() if isinstance(value, Config) else dict(value)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_yaml(value: Config | Mapping[str, Any]) -> str:
    """Return the resolved configuration as YAML, to be saved beside every output."""
    return yaml.safe_dump(plain(value), sort_keys=False, default_flow_style=None, width=100)
