"""The kinds of content. A kind here is its file and a line in `OWN`; a kind of another package is an entry point of
group `sidestack.contents` (docs/extending)."""

import functools
import inspect
from collections.abc import Mapping

from sidestack.infra.errors import ConfigError
from sidestack.infra.plugins import CONTENTS, with_plugins
from sidestack.ranker.contents.contract import Content
from sidestack.ranker.contents.dense import Dense
from sidestack.ranker.contents.hde import Hde
from sidestack.ranker.contents.kmeans import Kmeans
from sidestack.ranker.contents.none import NoContent
from sidestack.ranker.contents.sid_ngram import SidNgram
from sidestack.ranker.contents.side import Side

OWN: Mapping[str, type[Content]] = {
    "none": NoContent,
    "sid_ngram": SidNgram,
    "side": Side,
    "dense": Dense,
    "kmeans": Kmeans,
    "hde": Hde,
}


@functools.cache
def content_kinds() -> Mapping[str, type[Content]]:
    """Return the kinds of content by name, ours and those of installed packages.

    They are loaded by the first call, not at import of this module: a kind's module may be imported before this one.

    Raises:
        ConfigError: an installed package's entry point is not a kind of content; see `with_plugins`.
    """
    kinds = with_plugins(CONTENTS, OWN)
    for name, kind in kinds.items():
        if not (isinstance(kind, type) and issubclass(kind, Content)) or inspect.isabstract(kind):
            raise ConfigError(
                f"entry point {name!r} of group {CONTENTS!r}: must name a subclass of"
                f" ranker.contents.contract.Content that has `at`, is {kind!r}"
            )
    return kinds
