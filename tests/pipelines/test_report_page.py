"""The report's HTML page."""

from html.parser import HTMLParser

from sidestack.pipelines.report.page import render_page
from tests.pipelines.small_comparison import NO_FILE, comparison, page


class Balance(HTMLParser):
    """A parser that collects what the page would load, and fails on tags that do not close in order."""

    VOID = {"meta", "img", "source", "br", "link"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_loads_nothing() -> None:
    text = page()
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.loads) == 4  # two figures, light and dark
    assert all(value.startswith("data:image/svg+xml;base64,") for value in parser.loads)
    assert not parser.tags & {"script", "link", "iframe", "object"}
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style
    assert "prefers-color-scheme: dark" in style and 'name="viewport"' in text


def test_page_describes_the_run() -> None:
    text = page(warnings=("arms ran apart",))
    for expected in (
        "made by hand", "c0ffee" * 10, "2017-09-10 to 2017-11-11", "2017-11-12 to 2017-12-09", "torch 2.13.0",
        "291,204 impressions", "98,000", "9.18 %", "arms differ in training.seed: 0 in none; 1 in side",
        "run: {name: again}", "87.0 % of the 500 held-out items", "withheld below 100 held-out positives",
        "configuration of arm.none", "side over sid_ngram",
        "arms ran apart", "cross-entropy", "48.7 %",
    ):  # fmt: skip
        assert expected in text, expected
    assert "configuration of dataset" not in text
    assert text.index("better, NE gain") < text.index("98,000") < text.index("<h2>Results")
    alone = render_page(comparison(), (), {}, NO_FILE)
    assert "not one run's file: nobody wrote it" in alone and "for <code>--config" not in alone


def test_page_escapes_html() -> None:
    text = page(origin="<script>alert(1)</script>")
    assert "<script>" not in text and "&lt;script&gt;" in text
