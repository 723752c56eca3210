"""A cache of job states from a scheduler's service, for some seconds: callers query several times a second."""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

SECONDS = 2.0


class LastAnswers(Generic[T]):
    """The last answer of each job."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, T]] = {}

    def of(self, app_id: str, ask: Callable[[str], T]) -> T:
        """Return a job's cached answer, or query it if that is older than `SECONDS`; exceptions are not cached."""
        answer = self._answers.get(app_id)
        if answer is None or time.monotonic() - answer[0] > SECONDS:
            answer = self._answers[app_id] = time.monotonic(), ask(app_id)
        return answer[1]

    def forget(self, app_id: str) -> None:
        """Drop a job's cached answer."""
        self._answers.pop(app_id, None)
