"""No content: nothing is read, and its vectors are zeros."""

from dataclasses import dataclass
from typing import Self

from sidestack.ranker.contents.contract import Color, Content, Place


@dataclass(frozen=True)
class NoContent(Content):
    """No content: only ids and context."""

    color = Color("#6e7781", "#a4adb7")

    @classmethod
    def at(cls, place: Place) -> Self:
        """Return content that reads nothing."""
        return cls(place.position)
