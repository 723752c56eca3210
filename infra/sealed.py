"""JSON files that hold a digest of themselves, so that reading them detects a flipped bit or an edit by hand."""

import json
from collections.abc import Mapping
from typing import Any

from sidestack.infra.config import Config, digest
from sidestack.infra.errors import CommitError

OWN_DIGEST = "own_digest"
"""The field that holds the SHA-256 of the canonical JSON (sorted keys, no spaces) of all the others."""


def seal(content: Config) -> bytes:
    """Return the bytes of a file with this content and its digest."""
    values = json.loads(content.model_dump_json())
    return json.dumps({**values, OWN_DIGEST: digest(values)}, indent=1).encode() + b"\n"


def unseal(content: bytes, file: object) -> tuple[Mapping[str, Any], bool]:
    """Return a file's content without its digest, and whether it has a digest: earlier versions wrote none.

    Args:
        content: bytes of the file. file: its name, for errors.

    Raises:
        CommitError: it is not a JSON object, or does not match its digest.
    """
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError("must be a JSON object")
        own = values.pop(OWN_DIGEST, None)
        is_as_written = own is None or own == digest(values)
    except (ValueError, RecursionError) as error:
        raise CommitError(f"{file}: cannot be read: {error}") from error
    if not is_as_written:
        raise CommitError(f"{file}: is not of the digest that it holds: the file was altered")
    return values, own is not None
