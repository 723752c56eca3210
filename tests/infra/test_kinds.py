"""Settings whose class is selected by the field `kind`: parsing, errors at the right key, and writing."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel

from sidestack.infra import kinds as infra_kinds
from sidestack.infra.config import Config, digest, parse, plain
from sidestack.infra.errors import ConfigError
from sidestack.infra.kinds import ByKind, models_by_kind


class Shape(Config):
    kind: str


class Circle(Shape):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Box(Shape):
    kind: Literal["box"] = "box"
    width: int
    height: int = 2


class Named(Config):
    kind: Literal["named"] = "named"


OWN: Mapping[str, type[Shape]] = {"circle": Circle, "box": Box}


class Drawing(Config):
    shape: Annotated[Shape, ByKind(lambda: OWN)] = Circle()


def test_value_has_the_class_of_its_kind_and_is_written_with_all_fields() -> None:
    drawing = parse(Drawing, {"shape": {"kind": "box", "width": 3}}, "c")
    assert drawing.shape == Box(width=3)
    assert plain(drawing) == {"shape": {"kind": "box", "width": 3, "height": 2}}
    assert drawing.model_dump_json() == '{"shape":{"kind":"box","width":3,"height":2}}'
    assert parse(Drawing, plain(drawing), "c") == drawing
    assert digest(drawing) != digest(Drawing(shape=Box(width=4)))


def test_instances_and_the_default_need_no_kind() -> None:
    assert Drawing(shape=Box(width=1)).shape == Box(width=1)
    assert parse(Drawing, {}, "c").shape == Circle()


def test_excluded_field_is_left_out() -> None:
    dumped = Drawing(shape=Box(width=1)).model_dump(exclude={"shape": {"width"}})
    assert dumped == {"shape": {"kind": "box", "height": 2}}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"kind": "cirle"}, "c.shape.kind: is unknown; known are circle, box (value: 'cirle')"),
        ({"kind": ["circle"]}, "c.shape.kind: is unknown; known are circle, box (value: ['circle'])"),
        ({"radius": 2}, "c.shape.kind: is missing; known are circle, box"),
        ({"kind": "box"}, "c.shape.width: Field required"),
        ({"kind": "box", "width": 1, "heigth": 2}, "c.shape.heigth: unknown key; did you mean 'height'? (value: 2)"),
        ("circle", "c.shape: must be a mapping that has a kind (value: 'circle')"),
        (None, "c.shape: must be a mapping that has a kind (value: None)"),
    ],
)
def test_error_names_its_key(shape: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Drawing, {"shape": shape}, "c")
    assert str(caught.value) == message


def test_all_errors_of_a_value_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Drawing, {"shape": {"kind": "box", "width": "x", "depth": 1}, "colour": 1}, "c")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("found", [Circle(), Named, "Circle", Box])
def test_entry_point_that_is_not_a_subclass_is_refused(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_one(group: str, own: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
        return {**own, "round": found}

    monkeypatch.setattr(infra_kinds, "with_plugins", with_one)
    with pytest.raises(ConfigError, match="entry point 'round' of group 'shapes': must name a subclass of .*Shape"):
        models_by_kind("shapes", Shape, OWN)
