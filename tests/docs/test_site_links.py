"""The site's hook turns links that leave docs/ into paths and keeps all others."""

import runpy
from types import SimpleNamespace

import pytest

from tests.docs.pages import ROOT

on_page_markdown = runpy.run_path(str(ROOT / "docs/site_links.py"))["on_page_markdown"]


@pytest.mark.parametrize(
    ("page", "text", "shown"),
    [
        ("data.md", "see [configs/tables.yaml](../configs/tables.yaml).", "see `configs/tables.yaml`."),
        ("data.md", "[the image](../infra/deploy/Dockerfile#top)", "the image (`infra/deploy/Dockerfile`)"),
        ("results/tables.md", "[options.yaml](../../configs/options.yaml)", "`configs/options.yaml`"),
        ("results/tables.md", "[data](../data.md#a)", "[data](../data.md#a)"),
        ("data.md", "![x](requests.svg) [y](serving.md)", "![x](requests.svg) [y](serving.md)"),
    ],
)
def test_links_out_of_docs_become_paths(page: str, text: str, shown: str) -> None:
    assert on_page_markdown(text, page=SimpleNamespace(file=SimpleNamespace(src_uri=page))) == shown
