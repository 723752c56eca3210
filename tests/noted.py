"""Stand-ins for a function that note what they are called with before they do what it does."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def noted(note: Callable[..., object], function: Callable[..., T]) -> Callable[..., T]:
    """Return the function, with `note` called on the same arguments before it."""

    def both(*arguments: Any) -> T:
        note(*arguments)
        return function(*arguments)

    return both
