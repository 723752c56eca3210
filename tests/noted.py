"""Wrap a function so that its arguments are recorded before it is called."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def noted(note: Callable[..., object], function: Callable[..., T]) -> Callable[..., T]:
    """Return a function that calls `note` and then `function` with the same arguments."""

    def both(*arguments: Any) -> T:
        note(*arguments)
        return function(*arguments)

    return both
