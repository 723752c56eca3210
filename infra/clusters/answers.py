"""What a scheduler's service said of jobs, kept for some seconds: callers ask several times a second."""

import time
from collections.abc import Callable

from torchx.schedulers.api import DescribeAppResponse

SECONDS = 2.0


class Answers:
    """The last answer of each job."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, DescribeAppResponse | None]] = {}

    def of(self, app_id: str, ask: Callable[[str], DescribeAppResponse | None]) -> DescribeAppResponse | None:
        """Return a job's last answer, or ask anew where it is older than `SECONDS`; an error is not kept."""
        asked, answer = self._told.get(app_id, (float("-inf"), None))
        if time.monotonic() - asked > SECONDS:
            answer = ask(app_id)
            self._told[app_id] = time.monotonic(), answer
        return answer
