"""Hierarchical discrete embedding: prefixes of Semantic IDs, each embedded in a table, concatenated and projected."""

from dataclasses import dataclass

from torch import nn

from sidestack.ranker.contents.contract import Color
from sidestack.ranker.contents.sid_ngram import SidNgram


@dataclass(frozen=True)
class Hde(SidNgram):
    """The tables of `sid_ngram`, with vectors concatenated and projected instead of summed."""

    color = Color("#3a87ad", "#86cdf2")

    def projection(self, dim: int) -> nn.Linear:
        """Return the projection of the concatenated vectors."""
        return nn.Linear(len(self.tables) * dim, dim, bias=False)
