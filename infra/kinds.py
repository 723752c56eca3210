"""Settings whose `kind` selects their class: one of ours, or one that an installed package adds (`infra.plugins`)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from sidestack.infra.errors import ConfigError
from sidestack.infra.plugins import with_plugins

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class ByKind:
    """Annotation of a field whose value is parsed as the subclass that its `kind` selects.

    Errors then name the key of the faulty setting. The value is serialized with all fields of its own class.

    Attributes:
        kinds: returns the classes by kind. It is called when a value is parsed, not when the field is declared, so
            that the package of a class may import the module that declares the field.
    """

    kinds: Callable[[], Mapping[str, type[BaseModel]]]

    def __get_pydantic_core_schema__(self, base: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the field, whose annotated type is the base class."""
        return core_schema.no_info_plain_validator_function(lambda value: self._parsed(value, base))

    def _parsed(self, value: object, base: type[BaseModel]) -> BaseModel:
        """Parse a value as the class that its kind selects; an instance of the base class is returned as it is."""
        if isinstance(value, base):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("mapping", "must be a mapping that has a kind")
        kinds, kind = self.kinds(), value.get("kind")
        if isinstance(kind, str) and kind in kinds:
            return kinds[kind].model_validate(dict(value))
        context = {"rule": "is unknown" if "kind" in value else "is missing", "known": ", ".join(kinds)}
        fault = PydanticCustomError("kind", "{rule}; known are {known}", context)
        given = kind if "kind" in value else value
        raise ValidationError.from_exception_data(
            base.__name__, [InitErrorDetails(type=fault, loc=("kind",), input=given)]
        )


def models_by_kind(group: str, base: type, own: Mapping[str, type[M]]) -> Mapping[str, type[M]]:
    """Return our models by kind, followed by those that installed packages add.

    Args:
        group: the entry points' group; an entry's name is the kind. base: the base class of all models. own: ours.

    Raises:
        ConfigError: see `with_plugins`; or an entry point is not a subclass of `base` with its kind.
    """
    kinds = with_plugins(group, own)
    for kind, model in kinds.items():
        is_model = isinstance(model, type) and issubclass(model, base)
        if not is_model or get_args(model.model_fields["kind"].annotation) != (kind,):
            raise ConfigError(
                f"entry point {kind!r} of group {group!r}: must name a subclass of {base.__module__}.{base.__name__}"
                f" with `kind: Literal[{kind!r}]`, is {model!r}"
            )
    return kinds


def models_in(value: object) -> Iterator[type[BaseModel]]:
    """Yield the classes of a configuration and of all configurations nested in it."""
    if isinstance(value, BaseModel):
        yield type(value)
        value = dict(value)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from models_in(inner)
