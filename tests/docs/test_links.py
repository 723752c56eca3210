"""Links between pages lead somewhere, and the site's navigation has every page once."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, anchors, links


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_relative_links_resolve(page: Path) -> None:
    for link in links(page):
        path, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: leads out of the repository"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


def navigation() -> list[str]:
    """Return the pages that mkdocs.yml names."""
    text = (ROOT / "mkdocs.yml").read_text()
    return re.findall(r"[\w./-]+\.md", yaml.safe_dump(yaml.safe_load(text.replace("!!python/", "#"))["nav"]))


def test_navigation_names_every_page_once() -> None:
    named = navigation()
    assert len(set(named)) == len(named)
    assert set(named) == {str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents}


def test_documented_modules_are_there() -> None:
    documented = [name for page in (ROOT / "docs/api").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    assert documented
    for name in documented:
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name
