"""Kinds that installed packages add by entry points; an error names an invalid entry point and its package."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sidestack.infra.errors import ConfigError
from sidestack.infra.plugins import with_plugins

GROUP = "sidestack.test"
Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that installs a package with entry points of the test's group."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(name: str, entries: str) -> None:
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}\n")

    return run


def test_kinds_of_packages_are_listed_after_ours(install: Install) -> None:
    install("theirs", "b = json:dumps\na = json:loads")
    assert list(with_plugins(GROUP, {"z": None})) == ["z", "a", "b"]


def test_only_our_kinds_are_listed_without_packages() -> None:
    assert with_plugins(GROUP, {"z": 1}) == {"z": 1}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("z = json:dumps", r"'z' of group 'sidestack.test' \(package theirs\): the name is taken"),
        ("a = no_such_module:Thing", r"package theirs\): cannot be loaded: ModuleNotFoundError"),
        ("a = json:no_such_name", r"package theirs\): cannot be loaded: AttributeError"),
    ],
)
def test_invalid_entry_point_is_named_with_its_package(install: Install, entries: str, message: str) -> None:
    install("theirs", entries)
    with pytest.raises(ConfigError, match=message):
        with_plugins(GROUP, {"z": None})
