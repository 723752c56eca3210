"""Parse the documentation's pages: their commands, links, headings and code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELLS = ("bash", "sh", "shell", "console")

PAGES = sorted(
    file
    for pattern in ("*.md", "docs/**/*.md", "infra/**/*.md", ".github/**/*.md")
    for file in ROOT.glob(pattern)
    if not file.relative_to(ROOT).parts[0].startswith(".venv")
)
"""Every page of the repository."""

GUIDES = [page for page in PAGES if page.parent.name != "results" and page.name != "CHANGELOG.md"]
"""The pages that describe the present code. Pages of results and the changelog describe earlier commits."""

PLACEHOLDERS = re.compile(r"[A-Z][A-Z0-9_]*(/[A-Z][A-Z0-9_]*)*|\.\.\.")
"""Placeholders for the reader's values, such as `FILE`, `DIR` and `KEY`."""


@dataclass(frozen=True)
class Command:
    """One shell command of a page.

    Attributes:
        page: its file.
        words: the program and its arguments, without comments, variables set before the program, and redirections.
    """

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        """Return the command with its page, for the names of tests and for messages."""
        return f"{self.page.relative_to(ROOT)}: {' '.join(self.words)}"


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield language and text of a page's fenced code blocks, including those in lists."""
    for indent, language, text in re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", page.read_text(), re.M | re.S):
        yield language, re.sub(rf"^{indent}", "", text, flags=re.M)


def prose(page: Path) -> str:
    """Return a page without its fenced code."""
    return re.sub(r"^( *)```.*?^\1```[^\n]*$", "", page.read_text(), flags=re.M | re.S)


def inline_code(page: Path) -> list[str]:
    """Return the inline code of a page's prose, each without line breaks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> Iterator[Command]:
    """Yield a page's commands: those in fenced shell code, and this repository's commands in backticks."""
    for language, text in blocks(page):
        if language in SHELLS:
            prompted = re.findall(r"^\$ (.*)$", text, re.M)
            yield from _split(page, "\n".join(prompted) if prompted else text)
    for code in inline_code(page):
        if re.match(r"(make [a-z]|python -m |torchrun |torchx run |pytest )", code):
            yield from _split(page, code)


def _split(page: Path, text: str) -> Iterator[Command]:
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>()")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not word or not set(word) <= set("|;&"):
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield Command(page, tuple(words[: words.index(">")] if ">" in words else words))
            words = []


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?)\s*$", prose(page), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(anchor)
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', page.read_text()))
