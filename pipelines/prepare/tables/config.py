"""Configuration of a folder in the tables' contract."""

from typing import Literal

from sidestack.infra.config import Days
from sidestack.infra.identity import Identify
from sidestack.infra.remote.fields import Place
from sidestack.infra.tables import FollowupDays
from sidestack.pipelines.prepare.contract import SourceConfig


class TablesConfig(SourceConfig):
    """A log of one's own that grows: a folder of joined impressions, items and users in the tables' contract.

    The folder holds `dataset.json`, `items/` and `users/` (files in order; those in a folder `date=YYYY-MM-DD` are
    known from that date on), `events/date=YYYY-MM-DD/` (impressions with their request's columns, and labels), and,
    where labels come later than events, `labels/date=YYYY-MM-DD/`, row-aligned with the date's events. Files are told
    from each other by names, sizes and Parquet footers: one that is new, changed or removed is noticed, an untouched
    one is not read again.
    """

    kind: Literal["tables"]
    path: Place
    """The folder, or its URL."""
    requests: Literal["request_id", "user_time", "none"] | None = None
    """What makes a request: rows of one `request_id` beside each other; rows of one user and time (they are brought
    together, a date at a time in memory); or every row by itself. By default `request_id` where there is such a
    column, else none."""
    followup_days: dict[str, FollowupDays] = {}
    """By task: how long after an impression its label is known, where `dataset.json` does not say so or says otherwise;
    a label whose time is not over before `as_of` is null. A task that is named in neither is known at once."""
    identify: Identify = "footer"
    """What tells files from each other: size and Parquet footer, or the SHA-256 of all their bytes."""
    train_days: Days | None = None
    """With `test_days`: so many dates before the test dates are trained on; by default all."""
    test_days: Days | None = None
    """The newest so many dates are tested on; by default what `dataset.json` says."""
