"""The kinds of content, in the order of their colours. A kind of ours is one line here, one of another package an entry
point of group `sidestack.contents` (docs/extending)."""

from infra.plugins import CONTENTS as GROUP
from infra.plugins import with_plugins
from ranker.contents.contract import Content
from ranker.contents.dense import Dense
from ranker.contents.hde import Hde
from ranker.contents.kmeans import Kmeans
from ranker.contents.none import NoContent
from ranker.contents.sid_ngram import SidNgram
from ranker.contents.side import Side

CONTENTS: dict[str, type[Content]] = with_plugins(
    GROUP,
    {
        "none": NoContent,
        "sid_ngram": SidNgram,
        "side": Side,
        "dense": Dense,
        "kmeans": Kmeans,
        "hde": Hde,
    },
)
