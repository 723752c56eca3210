"""Links between pages resolve, and every page is reachable from the site's navigation."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

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


def test_every_page_is_in_the_navigation_or_in_its_folders_index() -> None:
    docs = ROOT / "docs"
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = re.findall(r"[\w./-]+\.md", nav)
    assert len(set(named)) == len(named)
    pages = {str(page.relative_to(docs)) for page in PAGES if docs in page.parents}
    assert set(named) <= pages
    for page in pages - set(named):
        index = docs / page.rpartition("/")[0] / "index.md"
        assert page.rpartition("/")[2] in {Path(link).name for link in links(index)}, f"{page}: no page leads to it"


def test_documented_modules_exist() -> None:
    pages = (page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    documented = [name for text in pages for name in re.findall(r"^::: (\S+)", text, re.M)]
    assert documented
    for name in documented:
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name
