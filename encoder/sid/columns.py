"""The Parquet columns of a set of SIDs: their names, and the spec in the metadata of each."""

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.config import VERSION, parse_written
from sidestack.infra.errors import SpecError

METADATA_KEY = b"sidestack.sid"
_VERSION_KEY = b"sidestack.version"


def sid_columns(base: str, spec: SidSpec) -> dict[str, SidSpec]:
    """Name the columns that hold the digits of `spec`, one per chunk: `base`, `base_1`, ...

    A prefix's columns are named `base_prefix_<p>`, `base_prefix_<p>_1`, ...

    Returns:
        column name -> the spec that its metadata must carry.
    """
    stem = base if spec.prefix is None else f"{base}_prefix_{spec.prefix}"
    chunks = range(len(spec.chunk_sizes))
    return {f"{stem}_{c}" if c else stem: spec.of_chunk(c) for c in chunks}


def content_columns(spec: SidSpec) -> dict[str, SidSpec]:
    """Return all SID columns of the items table, or of the users': name -> the spec in its metadata."""
    return sid_columns(spec.name, spec)


def event_columns(spec: SidSpec) -> dict[str, SidSpec]:
    """Return all SID columns of the events tables, prefixes included: name -> its spec."""
    return {name: held for base in spec.event_bases for name, held in position_columns(base, spec).items()}


def position_columns(base: str, spec: SidSpec) -> dict[str, SidSpec]:
    """Return the SID columns of one position in the events tables, by its stem: name -> its spec."""
    shorter = [spec.of_prefix(p) for p in spec.prefix_lengths if p < spec.digits]
    return {name: part for held in (spec, *shorter) for name, part in sid_columns(base, held).items()}


def with_sid_metadata(field: pa.Field, spec: SidSpec) -> pa.Field:
    """Add the spec, and the version of sidestack that writes it, to a field's metadata."""
    metadata: Mapping[bytes, bytes] = field.metadata or {}
    written = {METADATA_KEY: spec.model_dump_json().encode(), _VERSION_KEY: VERSION.encode()}
    return field.with_metadata({**metadata, **written})


def read_sid_spec(field: pa.Field) -> SidSpec:
    """Read the spec from a field's metadata; fields that an older version did not write have their defaults.

    Raises:
        SpecError: the field has no spec, or one that cannot be read; names the version that wrote it and the one that
            reads it.
    """
    metadata: Mapping[bytes, bytes] = field.metadata or {}
    if METADATA_KEY not in metadata:
        raise SpecError(f"column {field.name!r} carries no SID spec ({METADATA_KEY.decode()})")
    version = metadata.get(_VERSION_KEY, b"").decode()
    try:
        return parse_written(SidSpec, json.loads(metadata[METADATA_KEY]), "spec", version)
    except ValueError as error:
        raise SpecError(f"column {field.name!r}: its SID spec is not valid: {error}") from error


def require_spec(schema: pa.Schema, column: str, expected: SidSpec, path: Path) -> None:
    """Check that a file's SID column has the expected spec and codebook.

    Args:
        schema: the file's Arrow schema. column: the SID column's name.
        expected: the spec of exactly this column, as `content_columns` or `event_columns` returns it.
        path: the file, for the message.

    Raises:
        SpecError: names file, column, both fingerprints and the differences.
    """
    if column not in schema.names:
        raise SpecError(f"{path}: SID column {column!r} is missing; the file has {schema.names}")
    try:
        found = read_sid_spec(schema.field(column))
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error
    ours, theirs = expected.model_dump(), found.model_dump()
    differing = [f"{k}: {theirs[k]!r}, not {ours[k]!r}" for k in ours if ours[k] != theirs[k]]
    if differing:
        raise SpecError(
            f"{path}: column {column!r} has SIDs of fingerprint {found.fingerprint[:16]}…, the one"
            f" asked for is {expected.fingerprint[:16]}…; " + "; ".join(differing)
        )
