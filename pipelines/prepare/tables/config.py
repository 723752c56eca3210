"""Configuration of a folder in the tables' contract."""

from typing import Literal

from sidestack.infra.config import Days
from sidestack.infra.identity import Identify
from sidestack.infra.remote.fields import Place
from sidestack.infra.tables import FollowupDays
from sidestack.pipelines.prepare.contract import SourceConfig


class TablesConfig(SourceConfig):
    """The user's own growing log: a folder of joined impressions, items and users in the tables' contract.

    The folder holds `dataset.json`, `items/` and `users/` (files in order; those in a folder `date=YYYY-MM-DD` are
    known from that date on), `events/date=YYYY-MM-DD/` (impressions with their request's columns, and labels), and,
    where labels come later than events, `labels/date=YYYY-MM-DD/`, row-aligned with the date's events. Files are
    identified by names, sizes and Parquet footers: new, changed and removed files are detected, and unchanged files are
    not read again.
    """

    kind: Literal["tables"]
    path: Place
    """The folder, or its URL."""
    requests: Literal["request_id", "user_time", "none"] | None = None
    """What makes a request: adjacent rows with one `request_id`; rows with one user and time (grouped in memory, a date
    at a time); or every row by itself. By default `request_id` if there is such a column, else none."""
    followup_days: dict[str, FollowupDays] = {}
    """By task: how long after an impression its label is known; overrides `dataset.json`. A label is null if this time
    is not over before `as_of`. A task in neither is known at once."""
    identify: Identify = "footer"
    """How files are identified: by size and Parquet footer, or by the SHA-256 of all bytes."""
    train_days: Days | None = None
    """With `test_days`: number of dates before the test dates to train on; by default all."""
    test_days: Days | None = None
    """Number of newest dates to test on; by default the split in `dataset.json`."""
