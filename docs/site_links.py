"""Hook of mkdocs: links to files outside of docs/ become their paths, as the site has no such pages."""

import re
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)\s#]+)(?:#[^)\s]*)?\)")
"""A link that begins with `../`, and is no picture."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with such links replaced by their text and path.

    Args:
        markdown: the page's text. page: the mkdocs page; links are relative to its file.
    """
    folder = PurePosixPath("docs") / PurePosixPath(page.file.src_uri).parent

    def replace(match: re.Match[str]) -> str:
        text, target = match[1], normpath(str(folder / match[2]))
        if target.startswith("docs/"):
            return match[0]
        return f"`{target}`" if text.strip("`/").endswith(target.rpartition("/")[2]) else f"{text} (`{target}`)"

    return LINK.sub(replace, markdown)
