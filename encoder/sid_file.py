"""The description of a set of SIDs in plain JSON, for readers in any language: `sids/<set>/sid.json`.

It describes the digits, their packing into ids, and the digits in each column, with an example for testing a reader.
The same spec is in every file of SIDs as the key-value `sidestack.sid.<column>`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from sidestack.encoder.sid.columns import content_columns, event_columns
from sidestack.encoder.sid.packing import Packing
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.config import VERSION, Config

FOLDER = "sids"
"""The folder with one subfolder per set."""
_FILE = "sid.json"

_RULES: Mapping[Packing, str] = {
    "mixed_radix": (
        "id = sum over i of digit[i] * radix^(m-1-i), for the m digits of a column, i from 0;"
        " digit[i] = (id div radix^(m-1-i)) mod radix; the id of the first p digits = id div radix^(m-p)"
    ),
    "paper_eq5": (
        "id = sum over i of digit[i] * radix^(i+1), for the m digits of a column, i from 0;"
        " digit[i] = (id div radix^(i+1)) mod radix; the id of the first p digits = id mod radix^(p+1)"
    ),
}


class SidColumn(Config):
    """One column of a set, of int64 or of lists of int64."""

    table: str
    """The table that it is row-aligned with."""
    first_digit: int
    """The index of the first digit that it holds, from 0."""
    digits: int
    """The number of digits that it holds."""
    example: str
    """The id of the example's digits in this column, as decimal text: many JSON readers keep 53 bits of a number."""


class SidFile(Config):
    """The content of `sid.json`."""

    format: Literal["sidestack-sid/1"] = "sidestack-sid/1"
    version: str
    """The version of sidestack that wrote it."""
    spec: SidSpec
    """Levels, digits, their order, packing, prefix lengths, fingerprint: see `encoder.sid.SidSpec`."""
    radix: int
    """Values a digit can take: levels * lines."""
    rule: str
    """How digits are packed into an id, and an id is unpacked."""
    example: tuple[int, ...]
    """The digits of a made-up SID; `SidColumn.example` has its ids."""
    columns: dict[str, SidColumn]


def describe(spec: SidSpec, tables: Mapping[str, Sequence[str]]) -> SidFile:
    """Return the description of a set.

    Args:
        spec: of the whole SID. tables: the set's columns, by the table that they are row-aligned with.
    """
    specs = {**content_columns(spec), **event_columns(spec)}
    example = torch.arange(1, spec.digits + 1) % spec.radix
    columns = {}
    for table, name in ((table, name) for table, names in tables.items() for name in names):
        held = specs[name]
        columns[name] = SidColumn(
            table=table,
            first_digit=sum(held.chunk_sizes[: held.chunk]),
            digits=held.chunk_sizes[held.chunk],
            example=str(held.pack(example[None, : held.held_digits])[0, held.chunk].item()),
        )
    return SidFile(
        version=VERSION,
        spec=spec,
        radix=spec.radix,
        rule=_RULES[spec.packing],
        example=tuple(example.tolist()),
        columns=columns,
    )


def write_sid_file(folder: Path, spec: SidSpec, tables: Mapping[str, Sequence[str]]) -> None:
    """Write the description of a set, `sids/<set>/sid.json` in a folder; see `describe`."""
    path = folder / FOLDER / spec.name / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(describe(spec, tables).model_dump_json(indent=1) + "\n", encoding="utf-8")
