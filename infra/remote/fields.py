"""Paths as settings: in a file they are text, in the code `pathlib.Path` (`infra.remote.urls`)."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from sidestack.infra.remote.urls import address, local_path, require_local


def _place(value: Any) -> Any:
    return local_path(value) if isinstance(value, str | Path) else value


def _local(value: Any) -> Any:
    return require_local(value) if isinstance(value, str | Path) else value


def _checked(text: str) -> str:
    local_path(text)
    return text


Place = Annotated[Path, BeforeValidator(_place), PlainSerializer(address, return_type=str, when_used="json")]
"""A local path, or a URL, which is serialized as a URL: it does not depend on the machine."""
LocalPath = Annotated[Path, BeforeValidator(_local)]
"""A path on this machine."""
PlaceText = Annotated[str, AfterValidator(_checked)]
"""The text of a local path or a URL, which may be a glob."""
