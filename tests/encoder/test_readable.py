"""Other programs read every table in the store, and ids by `sid.json` or by the key-value metadata of a file."""

import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import torch

from sidestack.encoder.sid.columns import content_columns, event_columns
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_file import describe
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.snapshot import CONTENT, read_dataset
from tests.datasets import content
from tests.encoder.fabricated import BARE_ITEMS, SPEC

KNOWN_TYPES = {"NONE", "STRING", "INT", "TIMESTAMP"}
"""Logical types of columns that Spark, polars, DuckDB and pandas all read; FLOAT16 is not among them."""
KNOWN_ENCODINGS = {"PLAIN", "RLE", "RLE_DICTIONARY", "BIT_PACKED", "DELTA_BINARY_PACKED"}
"""Encodings that all of them read; Spark reads BYTE_STREAM_SPLIT since 4, DELTA_BINARY_PACKED since 3.3."""


def test_duckdb_reads_every_table(materialized: Path) -> None:
    dataset = read_dataset(materialized)
    tables = {entry.table.rpartition("/")[2] for entry in dataset.snapshot.partitions}
    assert tables == {"items", "users", "requests", "events", "labels"}
    for entry in dataset.snapshot.partitions:
        for file in entry.files:
            path = dataset.store / entry.path / file.name
            expected = [row for group in row_groups([path]) for row in read_row_group(group).to_pylist()]
            found = (
                duckdb.sql(f"SELECT * FROM read_parquet('{path}', hive_partitioning = false)")
                .to_arrow_table()
                .to_pylist()
            )
            assert found == expected


def test_every_column_has_a_type_and_an_encoding_that_all_readers_support(materialized: Path) -> None:
    dataset = read_dataset(materialized)
    for entry in dataset.snapshot.partitions:
        metadata = pq.read_metadata(dataset.store / entry.path / entry.files[0].name)
        for place in range(metadata.num_columns):
            column = metadata.schema.column(place)
            assert column.logical_type.type in KNOWN_TYPES, column
            assert set(metadata.row_group(0).column(place).encodings) <= KNOWN_ENCODINGS, column


def key_values(file: Path) -> dict[str, str]:
    """Return the key-value metadata of a file, as DuckDB reads it."""
    rows = duckdb.sql(f"SELECT key, value FROM parquet_kv_metadata('{file}')").fetchall()
    return {key.decode(): value.decode() for key, value in rows}


def unpacked(number: int, radix: int, digits: int) -> list[int]:
    """Unpack an id by the `rule` of `mixed_radix`, without the project's code."""
    return [number // radix ** (digits - 1 - i) % radix for i in range(digits)]


def test_sid_json_is_sufficient_to_unpack_the_ids(materialized: Path) -> None:
    description = json.loads((materialized / "sids" / "sid" / "sid.json").read_text())
    dataset = read_dataset(materialized)
    spec = SidSpec.model_validate(dataset.snapshot.sids["sid"].spec)
    assert SidSpec.model_validate(description["spec"]) == spec
    assert {name: column["table"] for name, column in description["columns"].items()} == {
        "sid": "items",
        **{f"item_sid{suffix}": "events" for suffix in ("", "_prefix_2", "_prefix_4")},
        **{f"history_sids{suffix}": "requests" for suffix in ("", "_prefix_2", "_prefix_4")},
    }
    for column in description["columns"].values():
        digits = unpacked(int(column["example"]), description["radix"], column["digits"])
        assert digits == description["example"][column["first_digit"] :][: column["digits"]]
    sids = content(dataset, dataset.snapshot.sids["sid"].table("sid", "items"))["sid"].to_pylist()
    digits_ND = [None if sid is None else unpacked(sid, description["radix"], 6) for sid in sids]
    assert [i for i, digits in enumerate(digits_ND) if digits is None] == list(BARE_ITEMS)
    own_ND = [None if sid is None else spec.unpack(torch.tensor([[sid]]))[0].tolist() for sid in sids]
    assert digits_ND == own_ND and len({str(digits) for digits in digits_ND}) > 10


@pytest.mark.parametrize("packing", ["mixed_radix", "paper_eq5"])
def test_a_long_sid_is_described_column_by_column(packing: str) -> None:
    spec = SidSpec.model_validate(
        {"quantizer": "structured", "levels": 3, "digits": 50, "depth": 25, "groups": 2, "prefix_lengths": (20, 45),
         "packing": packing, "fingerprint": "ab" * 32}
    )  # fmt: skip
    description = describe(spec, {"items": list(content_columns(spec)), "events": list(event_columns(spec))})
    limit = spec.chunk_sizes[0]
    assert description.example == tuple((i + 1) % 3 for i in range(50))
    places = {name: (column.first_digit, column.digits) for name, column in description.columns.items()}
    assert places["sid"] == places["item_sid"] == (0, limit)
    assert places["sid_1"] == (limit, 50 - limit)
    assert places["item_sid_prefix_20"] == (0, 20)
    assert places["history_sids_prefix_45_1"] == (limit, 45 - limit)
    for column in description.columns.values():
        digits = description.example[column.first_digit :][: column.digits]
        powers = range(1, len(digits) + 1) if packing == "paper_eq5" else reversed(range(len(digits)))
        assert int(column.example) == sum(g * 3**k for g, k in zip(digits, powers, strict=True))
    assert "radix^(i+1)" in description.rule if packing == "paper_eq5" else "radix^(m-1-i)" in description.rule


@pytest.mark.parametrize("base", ["items", "events", "requests"])
def test_key_values_of_a_file_contain_the_spec(materialized: Path, base: str) -> None:
    dataset = read_dataset(materialized)
    listed = dataset.snapshot.sids["sid"]
    spec = SidSpec.model_validate(listed.spec)
    known = {**content_columns(spec), **event_columns(spec)}
    for file in dataset.files(listed.table("sid", base)):
        found = key_values(file.path)
        for name in listed.columns[base]:
            assert SidSpec.model_validate_json(found[f"sidestack.sid.{name}"]) == known[name]


def test_embeddings_are_stored_as_float32_with_their_length(materialized: Path) -> None:
    dataset = read_dataset(materialized)
    for entity, table in CONTENT.items():
        file = dataset.files(table)[0].path
        found = key_values(file)
        for name, dim in SPEC.content(entity).embeddings.items():
            assert found[f"sidestack.list_size.{name}"] == str(dim)
            assert duckdb.sql(f"SELECT DISTINCT typeof({name}) FROM read_parquet('{file}')").fetchall() == [
                ("FLOAT[]",)
            ]
