"""Ids masked by a keyed hash: HMAC-SHA256, in Python for one id, and in SQL for the columns of a file.

A masked id is the first 32 hex digits of HMAC-SHA256(key, "<kind>:<id>"). The kind (user, item, event, request)
separates equal ids of users and items. A key is identified by its id, a digest of the key under another label.
"""

import hashlib
import hmac
import json
import os
from dataclasses import dataclass, field
from typing import Literal, get_args

import duckdb

from sidestack.infra.errors import ConfigError
from sidestack.infra.files import write_whole
from sidestack.infra.remote.copies import is_there, read_bytes, remove_file
from sidestack.infra.store import Store
from sidestack.infra.tables import parse_json
from sidestack.pipelines.prepare.log.privacy_config import KeyPlace, Privacy

IdKind = Literal["user", "item", "event", "request"]
KINDS: tuple[IdKind, ...] = get_args(IdKind)
RECORD = "masked_ids.json"
"""File in a store that records which key masked its ids; a store of unmasked ids has none."""
WHERE = "prepare.source.privacy"
_LEAST_BYTES = 32
_BLOCK = 64
"""Bytes of a SHA-256 block, to which HMAC (RFC 2104) pads the key."""
_ID_DIGITS = 32


@dataclass(frozen=True)
class Masking:
    """Masking of ids by a key.

    Attributes:
        key: the secret.
    """

    key: bytes = field(repr=False)

    @property
    def key_id(self) -> str:
        """A digest of the key, under a label that no id has: it identifies the key and masks nothing."""
        return hmac.digest(self.key, b"sidestack: which key", "sha256").hex()[:16]

    def masked(self, kind: IdKind, id_text: str) -> str:
        """Return the masked form of one id."""
        return hmac.digest(self.key, f"{kind}:{id_text}".encode(), "sha256").hex()[:_ID_DIGITS]

    def install(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Define `masked_id(kind, id)` in a connection's SQL; it is null for null.

        The key is passed in a variable, as DuckDB's errors may quote a statement.
        """
        block = self.key if len(self.key) <= _BLOCK else hashlib.sha256(self.key).digest()
        for name, pad in (("inner", 0x36), ("outer", 0x5C)):
            padded = bytes(byte ^ pad for byte in block.ljust(_BLOCK, b"\0"))
            connection.execute(f"SET VARIABLE id_{name} = ?::BLOB", [padded])
        connection.execute(
            "CREATE OR REPLACE TEMP MACRO masked_id(kind, id) AS substr(sha256(getvariable('id_outer')"
            f" || unhex(sha256(getvariable('id_inner') || encode(kind || ':' || id)))), 1, {_ID_DIGITS})"
        )


def masking_of(privacy: Privacy | None) -> Masking | None:
    """Return the masking of a configuration; None: ids are stored as they are.

    Raises:
        ConfigError: the key is missing or too short.
    """
    if privacy is None or privacy.key is None:
        return None
    key, place = _read_key(privacy.key)
    if len(key) < _LEAST_BYTES:
        raise ConfigError(
            f"{WHERE}.key: {place}: the key has {len(key)} bytes; it must have {_LEAST_BYTES} or more, at random:"
            " `openssl rand -hex 32` makes one"
        )
    return Masking(key)


def _read_key(place: KeyPlace) -> tuple[bytes, str]:
    """Return the key, without surrounding white space, and where it was read."""
    if place.env is not None:
        text = os.environ.get(place.env)
        if text is None:
            raise ConfigError(f"{WHERE}.key: environment variable {place.env!r} is not set; it must hold the key")
        return text.strip().encode(), f"environment variable {place.env!r}"
    assert place.file is not None
    try:
        return place.file.read_bytes().strip(), str(place.file)
    except OSError as error:
        raise ConfigError(f"{WHERE}.key: {place.file}: cannot be read: {error.strerror}") from error


def require_one_key(store: Store, masking: Masking | None, mask_items: bool) -> None:
    """Check that a store's ids are masked by this key; record the key's id in a store without one.

    Raises:
        ConfigError: the store has ids of another key, unmasked ids, or item ids that are masked differently.
    """
    record = store.path / RECORD
    own = None if masking is None else {"key_id": masking.key_id, "items": mask_items}
    if is_there(store.path / "raw"):
        found = parse_json(read_bytes(record), str(record)) if is_there(record) else None
        if found != own:
            raise ConfigError(
                f"{WHERE}: {store.path}: holds {_describe_record(found)}; the configuration says"
                f" {_describe_record(own)}. These are two id spaces: configure what the store holds, or begin anew"
                " under another run.name, from the raw files that are still there, and delete this store once nothing"
                " reads it"
            )
    elif own is not None:
        write_whole(record, json.dumps(own).encode())
    else:
        remove_file(record)  # from a run that ended before it wrote an id


def _describe_record(record: dict[str, object] | None) -> str:
    if record is None:
        return "ids that are not masked"
    items = "masked" if record.get("items") else "not masked"
    return f"ids masked by key {record.get('key_id')}, items' {items}"
