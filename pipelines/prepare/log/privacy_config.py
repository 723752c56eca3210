"""Configuration of a raw log's privacy: masked ids, common values, and retention."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from sidestack.infra.config import Config, Days

_ENV_NAME = re.compile("[A-Z_][A-Z0-9_]*")


class KeyPlace(Config):
    """Where the secret key of masked ids is read from; the key itself is never in a configuration."""

    env: str | None = None
    """Name of an environment variable, in capitals."""
    file: Path | None = None
    """A file that holds the key and nothing else."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.env is None) == (self.file is None):
            raise ValueError("name one place of the key, {env: NAME_IN_CAPITALS} or {file: PATH}; never the key itself")
        return self


def _without_secret(value: Any) -> Any:
    """Replace an invalid place by `{}`: errors show values, and this one may be the key itself."""
    if isinstance(value, KeyPlace):
        return value
    if not isinstance(value, Mapping) or not value.keys() <= {"env", "file"}:
        return {}
    env, file = value.get("env"), value.get("file")
    is_env = env is None or (isinstance(env, str) and _ENV_NAME.fullmatch(env))
    return value if is_env and (file is None or isinstance(file, str | Path)) else {}


class Privacy(Config):
    """Privacy settings, applied to a raw log before anything is written."""

    key: Annotated[KeyPlace, BeforeValidator(_without_secret)] | None = None
    """With a key, ids of users, events and requests are stored as HMAC-SHA256; without one, as they are."""
    mask_items: bool = False
    """Whether the ids of items are masked too."""
    min_users: Annotated[int, Field(ge=2)] | None = None
    """A categorical value with fewer distinct users (for items: users who met it) becomes `unknown`."""
    retention_days: Days | None = None
    """Rows older than this many days before the log's end (`as_of`) are not read, and their dates are in no snapshot;
    `python -m pipelines.privacy.expire` deletes them from the store."""

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if self.mask_items and self.key is None:
            raise ValueError("mask_items: ids are masked by a key; name the place of one (privacy.key)")
        return self
