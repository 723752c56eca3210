"""Stage `materialize`: right SIDs in every column, the same bytes however the work is shared out."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from encoder.bundle import load_bundle
from encoder.materialize import encode
from encoder.sid import SidSpec, content_columns, event_columns, read_sid_spec, require_spec
from encoder.sid_codebook import read_codebook
from encoder.sid_map import NULL
from encoder.signals import signal_batch
from infra.distributed import World
from infra.errors import ConfigError, DataError, SpecError, StageError
from infra.parquet import read_row_group, row_groups
from tests.distributed import run_distributed
from tests.encoder.fabricated import (
    BARE_ITEMS,
    BARE_USERS,
    LOCAL,
    SPEC,
    embedding_column,
    item_table,
    materialize_dataset,
    tables_of,
    train_encoder,
    users,
    write_dataset,
    write_table,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def materialized(dataset: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("materialized") / "tables"
    materialize_dataset(LOCAL, dataset, encoder, out)
    return out


def table_of(path: Path, table: str) -> pa.Table:
    files = sorted((path / table).rglob("*.parquet"))
    return pa.concat_tables(read_row_group(group) for group in row_groups(files))


def expected_digits(encoder: Path, table: pa.Table) -> list[list[int] | None]:
    """Encode items one by one, without blocks, map or packing."""
    bundle = load_bundle(encoder, CPU)
    batch = signal_batch(table, bundle.signals)
    rows = [bundle.model.digits(batch.sliced(i, i + 1))[0].tolist() for i in range(len(batch))]
    return [row if present else None for row, present in zip(rows, batch.any_present.tolist(), strict=True)]


def spelled(digits: list[int] | None, length: int | None = None) -> int | None:
    """Spell ternary digits as a number, the first digit most significant."""
    return None if digits is None else int("".join(map(str, digits[:length])), 3)


def test_items_carry_their_sid(materialized: Path, encoder: Path) -> None:
    digits = expected_digits(encoder, item_table())
    items = table_of(materialized, "items")
    assert items["sid"].type == pa.int64()
    assert items["sid"].to_pylist() == [spelled(row) for row in digits]
    assert [i for i, sid in enumerate(items["sid"].to_pylist()) if sid is None] == list(BARE_ITEMS)
    assert items.drop(["sid"]).equals(item_table())


def test_events_carry_item_and_history_sids_whole_and_by_prefix(
    materialized: Path, dataset: Path, encoder: Path
) -> None:
    digits = expected_digits(encoder, item_table())
    events, before = table_of(materialized, "events"), table_of(dataset, "events")
    assert events.select(before.column_names).equals(before)
    for suffix, length in (("", None), ("_prefix_2", 2), ("_prefix_4", 4)):
        found = events[f"item_sid{suffix}"].to_pylist()
        assert found == [spelled(digits[i], length) for i in before["item_id"].to_pylist()]
        histories = events[f"history_sids{suffix}"].to_pylist()
        wanted = [[spelled(digits[i], length) for i in row] for row in before["history_item_ids"].to_pylist()]
        assert histories == wanted
        assert any(None in row for row in histories)
        assert None in found
    assert events.column_names == [*before.column_names, *event_columns(load_bundle_spec(materialized))]


def load_bundle_spec(materialized: Path) -> SidSpec:
    return read_sid_spec(pq.read_schema(materialized / "items/part-00000.parquet").field("sid"))


def test_spec_and_fingerprint_are_in_every_column(materialized: Path, encoder: Path) -> None:
    trained = load_bundle(encoder, CPU).spec
    spec = load_bundle_spec(materialized)
    assert spec == trained.model_copy(update={"prefix_lengths": (2, 4, 6)})
    for folder, columns in (("items", content_columns(spec)), ("events", event_columns(spec))):
        for path in (materialized / folder).rglob("*.parquet"):
            for name, column_spec in columns.items():
                require_spec(pq.read_schema(path), name, column_spec, path)


def test_the_rest_is_as_it_was_and_the_map_is_gone(materialized: Path, dataset: Path) -> None:
    before, after = tables_of(dataset), tables_of(materialized)
    assert set(before) == set(after) - {"codebooks/sid.safetensors"}
    for name in ("users/part-00000.parquet", "vocabularies/brand.json", "dataset.json"):
        assert before[name] == after[name]
    assert {path.name for path in materialized.iterdir()} <= {
        "items", "users", "events", "vocabularies", "codebooks", "dataset.json",
        "manifest.json", "summary.json", "config.yaml", "history.jsonl",
    }  # fmt: skip
    summary = json.loads((materialized / "summary.json").read_text())
    sids = [sid for sid in table_of(materialized, "items")["sid"].to_pylist() if sid is not None]
    found = summary["sids"]["sid"]
    assert (summary["items"], found["null"]) == (700, 3)
    assert found["distinct"] == len(set(sids))
    assert found["unique_share"] == pytest.approx(len(set(sids)) / 697)


@pytest.mark.parametrize("batch_size", [1, 300, 100_000])
def test_any_batch_size_gives_the_same_bytes(
    materialized: Path, dataset: Path, encoder: Path, tmp_path: Path, batch_size: int
) -> None:
    materialize_dataset(LOCAL, dataset, encoder, tmp_path / "out", {"batch_size": batch_size})
    assert tables_of(tmp_path / "out") == tables_of(materialized)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same_bytes(
    materialized: Path, dataset: Path, encoder: Path, tmp_path: Path, world_size: int
) -> None:
    run_distributed(materialize_dataset, dataset, encoder, tmp_path / "out", world_size=world_size)
    assert tables_of(tmp_path / "out") == tables_of(materialized)


def test_the_stored_precision_does_not_show(materialized: Path, dataset: Path, encoder: Path, tmp_path: Path) -> None:
    """Halves, and the same values stored as float32."""
    wide = Path(shutil.copytree(dataset, tmp_path / "wide"))
    for file in sorted((wide / "items").glob("*.parquet")):
        table = pa.concat_tables(read_row_group(group) for group in row_groups([file]))
        for name, dim in SPEC.embeddings.items():
            at = table.column_names.index(name)
            table = table.set_column(at, name, table[name].cast(pa.list_(pa.float32(), dim)))
        write_table(file, table, 90)
    materialize_dataset(LOCAL, wide, encoder, tmp_path / "out")
    assert table_of(tmp_path / "out", "items").schema.field("text_embedding").type.value_type == pa.float32()
    assert table_of(tmp_path / "out", "items")["sid"].equals(table_of(materialized, "items")["sid"])
    assert table_of(tmp_path / "out", "events").equals(table_of(materialized, "events"))


@pytest.mark.parametrize("segment_rows", [1, 200])
def test_a_long_file_becomes_several_with_the_same_rows(
    materialized: Path, dataset: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment_rows: int
) -> None:
    monkeypatch.setattr("encoder.materialize.SEGMENT_ROWS", segment_rows)
    materialize_dataset(LOCAL, dataset, encoder, tmp_path / "out")
    assert table_of(tmp_path / "out", "items").equals(table_of(materialized, "items"))
    names = [path.name for path in sorted((tmp_path / "out/items").iterdir())]
    # Row groups of 90: files of 400 and 300 rows are cut after 180 rows, or after every row group.
    per_file = {1: (5, 4), 200: (3, 2)}[segment_rows]
    assert names == [f"part-{file:05d}-{part:05d}.parquet" for file in (0, 1) for part in range(per_file[file])]


def test_parts_that_would_not_sort_as_the_items_do_are_refused(
    dataset: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder.materialize.SEGMENT_ROWS", 200)
    other = shutil.copytree(dataset, tmp_path / "other")
    (other / "items/part-00001.parquet").rename(other / "items/part.parquet")
    (other / "items/part-00000.parquet").rename(other / "items/part-2.parquet")
    with pytest.raises(DataError, match="would not sort as the rows do"):
        materialize_dataset(LOCAL, other, encoder, tmp_path / "out")


@pytest.mark.parametrize(("table", "column"), [("items", "brand"), ("events", "history_item_ids")])
def test_a_column_that_is_missing_is_named(
    dataset: Path, encoder: Path, tmp_path: Path, table: str, column: str
) -> None:
    other = shutil.copytree(dataset, tmp_path / "other")
    file = sorted((other / table).rglob("*.parquet"))[0]
    rows = pa.concat_tables(read_row_group(group) for group in row_groups([file]))
    write_table(file, rows.drop_columns([column]), 90)
    with pytest.raises(DataError, match=rf"part-00000\.parquet, row group 0: column '{column}' is missing"):
        materialize_dataset(LOCAL, other, encoder, tmp_path / "out")


def test_an_id_depends_on_its_own_signals_alone(encoder: Path) -> None:
    """Other items, their order, the place in a block, the stored precision: none of them shows."""
    bundle = load_bundle(encoder, CPU)
    table = item_table()
    ids_NC = encode(bundle, bundle.spec, signal_batch(table, bundle.signals))
    order = np.random.default_rng(0).permutation(len(table))[:431]
    shuffled_NC = encode(bundle, bundle.spec, signal_batch(table.take(pa.array(order)), bundle.signals))
    assert np.array_equal(shuffled_NC, ids_NC[order])
    wide = table
    for name, dim in SPEC.embeddings.items():
        at = table.column_names.index(name)
        wide = wide.set_column(at, name, table[name].cast(pa.list_(pa.float32(), dim)))
    assert np.array_equal(encode(bundle, bundle.spec, signal_batch(wide, bundle.signals)), ids_NC)
    assert (ids_NC[list(BARE_ITEMS)] == NULL).all()


def test_long_sids_take_several_columns(dataset: Path, tmp_path: Path) -> None:
    quantizer = {"kind": "structured", "levels": 256, "groups": 1, "depth": 9, "group_dim": 6}
    train_encoder(LOCAL, dataset, tmp_path / "encoder", {"quantizer": quantizer, "training": {"epochs": 1}})
    changes = {"prefix_lengths": {"sid": [3, 8]}}
    materialize_dataset(LOCAL, dataset, tmp_path / "encoder", tmp_path / "out", changes)
    spec = load_bundle_spec(tmp_path / "out")
    items, events = table_of(tmp_path / "out", "items"), table_of(tmp_path / "out", "events")
    assert events.column_names[-10:] == [
        "item_sid", "item_sid_1", "item_sid_prefix_3", "item_sid_prefix_8", "item_sid_prefix_8_1",
        "history_sids", "history_sids_1", "history_sids_prefix_3", "history_sids_prefix_8", "history_sids_prefix_8_1",
    ]  # fmt: skip
    known = items.filter(items["sid"].is_valid())
    ids_NC = torch.stack([torch.from_numpy(known[name].to_numpy()) for name in ("sid", "sid_1")], dim=-1)
    alone = [row for row in expected_digits(tmp_path / "encoder", item_table()) if row is not None]
    # With steps this fine, some rows encoded one by one fall across a border: the reason for BLOCK_ROWS.
    same = [found == row for found, row in zip(spec.unpack(ids_NC).tolist(), alone, strict=True)]
    assert np.mean(same) > 0.98
    sid_of = dict(zip(items["item_id"].to_pylist(), items["sid"].to_pylist(), strict=True))
    wanted = [None if sid_of[i] is None else sid_of[i] // 256**4 for i in events["item_id"].to_pylist()]
    assert events["item_sid_prefix_3"].to_pylist() == wanted


def test_the_paper_s_packing(dataset: Path, encoder: Path, tmp_path: Path) -> None:
    materialize_dataset(LOCAL, dataset, encoder, tmp_path / "out", {"packing": "paper_eq5"})
    sids = table_of(tmp_path / "out", "items")["sid"].to_pylist()
    digits = expected_digits(encoder, item_table())
    eq5 = [None if row is None else sum(3**k * g for k, g in enumerate(row, start=1)) for row in digits]
    assert sids == eq5
    prefixes = table_of(tmp_path / "out", "events")["item_sid_prefix_2"].to_pylist()
    item_ids = table_of(dataset, "events")["item_id"].to_pylist()
    wanted = [None if digits[i] is None else 3 * digits[i][0] + 9 * digits[i][1] for i in item_ids]
    assert prefixes == wanted


def test_several_encoders_give_each_what_it_gives_alone(
    materialized: Path, dataset: Path, encoder: Path, tmp_path: Path
) -> None:
    quantizer = {"kind": "rqvae", "codes": 16, "depth": 2, "groups": 1, "group_dim": 6}
    train_encoder(LOCAL, dataset, tmp_path / "other", {"quantizer": quantizer, "training": {"epochs": 1}})
    changes = {"prefix_lengths": {"code": [1]}}
    materialize_dataset(LOCAL, dataset, encoder, tmp_path / "both", changes, code=tmp_path / "other")
    both, one = table_of(tmp_path / "both", "events"), table_of(materialized, "events")
    assert both.column_names == [
        *one.column_names,
        "item_code",
        "item_code_prefix_1",
        "history_codes",
        "history_codes_prefix_1",
    ]
    assert both.select(one.column_names).equals(one)
    bundle = load_bundle(tmp_path / "other", CPU)
    spec = read_sid_spec(both.schema.field("item_code"))
    assert spec == bundle.spec.model_copy(update={"name": "code", "prefix_lengths": (1,)})
    digits = expected_digits(tmp_path / "other", item_table())
    wanted = [None if row is None else 16 * row[0] + row[1] for row in digits]
    assert table_of(tmp_path / "both", "items")["code"].to_pylist() == wanted
    assert torch.equal(read_codebook(tmp_path / "both", spec), bundle.model.quantizer.codewords())


def test_users_are_encoded_into_their_table_and_every_event(
    materialized: Path, dataset: Path, encoder: Path, tmp_path: Path
) -> None:
    changes = {"entity": "user", "training": {"epochs": 1, "batch_size": 8, "holdout_share": 0.3}}
    train_encoder(LOCAL, dataset, tmp_path / "habits", changes)
    lengths = {"prefix_lengths": {"habit": [2]}}
    materialize_dataset(LOCAL, dataset, encoder, tmp_path / "out", lengths, habit=tmp_path / "habits")
    people, log = table_of(tmp_path / "out", "users"), table_of(tmp_path / "out", "events")
    spec = read_sid_spec(people.schema.field("habit"))
    assert (spec.entity, spec.name) == ("user", "habit")
    wanted = [spelled(row) for row in expected_digits(tmp_path / "habits", users())]
    assert people["habit"].to_pylist() == wanted
    assert [user for user, sid in enumerate(wanted) if sid is None] == list(BARE_USERS)
    before = table_of(materialized, "events")
    assert log.column_names == [*before.column_names, "user_habit", "user_habit_prefix_2"]
    assert log.select(before.column_names).equals(before)
    assert log["user_habit"].to_pylist() == [wanted[user] for user in log["user_id"].to_pylist()]
    assert table_of(tmp_path / "out", "items").equals(table_of(materialized, "items"))


def test_a_codebook_of_another_encoder_is_refused(materialized: Path) -> None:
    spec = load_bundle_spec(materialized)
    with pytest.raises(SpecError, match=r"sid.safetensors: fingerprint .*the SIDs 'sid' have abab"):
        read_codebook(materialized, spec.model_copy(update={"fingerprint": "ab" * 32}))
    with pytest.raises(DataError, match="cannot be read as the codebook of the SIDs 'other'"):
        read_codebook(materialized, spec.model_copy(update={"name": "other"}))


def test_a_prefix_of_sids_that_no_encoder_gives_is_refused(dataset: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefix_lengths.other: no encoder of this name; given are sid"):
        materialize_dataset(LOCAL, dataset, encoder, tmp_path / "out", {"prefix_lengths": {"other": [2]}})


def test_a_day_without_events_still_has_the_columns(encoder: Path, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "dataset")
    empty = path / "events/date=2024-01-02/part-00000.parquet"
    write_table(empty, read_row_group(row_groups([empty])[0]).slice(0, 0), 90)
    materialize_dataset(LOCAL, path, encoder, tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out" / empty.relative_to(path))
    for name, spec in event_columns(load_bundle_spec(tmp_path / "out")).items():
        require_spec(schema, name, spec, empty)


def test_a_prefix_longer_than_the_sid_is_refused(dataset: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefix_lengths \(5, 10\) must rise within 1..6"):
        materialize_dataset(LOCAL, dataset, encoder, tmp_path / "out", {"prefix_lengths": {"sid": [5, 10]}})


def test_a_dataset_with_sids_is_refused(materialized: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has a column 'sid' already"):
        materialize_dataset(LOCAL, materialized, encoder, tmp_path / "out")


def test_an_altered_encoder_is_refused(dataset: Path, encoder: Path, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(encoder, tmp_path / "altered"))
    text = (altered / "encoder.json").read_text()
    found = load_bundle(encoder, CPU).spec.fingerprint
    (altered / "encoder.json").write_text(text.replace(found, "0" * 64))
    with pytest.raises(SpecError, match="fingerprint of these weights"):
        materialize_dataset(LOCAL, dataset, altered, tmp_path / "out")


def changed(path: Path, name: str, edit: Any) -> None:
    """Rewrite a Parquet file with one column edited as a Python list."""
    table = pa.concat_tables(read_row_group(group) for group in row_groups([path]))
    at = table.column_names.index(name)
    values = table[name].to_pylist()
    edit(values)
    field = table.schema.field(name)
    write_table(path, table.set_column(at, field, pa.array(values, field.type)), 90)


def failures(world: World, encoder: Path, out: Path, *datasets: Path) -> list[str]:
    messages = []
    for dataset in datasets:
        with pytest.raises((DataError, StageError)) as refused:
            materialize_dataset(world, dataset, encoder, out)
        messages.append(str(refused.value))
    return messages


def test_bad_rows_stop_both_ranks_and_leave_nothing(encoder: Path, tmp_path: Path) -> None:
    unknown, late = (write_dataset(tmp_path / name) for name in ("unknown", "late"))
    file = "events/date=2024-01-02/part-00000.parquet"

    def to_unknown_item(values: list[int]) -> None:
        values[100] = 700

    def to_the_future(values: list[list[datetime]]) -> None:
        row = next(i for i in range(90, 200) if values[i])
        values[row][-1] = datetime(2024, 2, 1)

    changed(unknown / file, "item_id", to_unknown_item)
    changed(late / file, "history_times", to_the_future)
    out = tmp_path / "out" / "tables"
    for about_item, about_time in run_distributed(failures, encoder, out, unknown, late):
        assert f"{unknown / file}, row group 1: column 'item_id': id 700 is outside the table [0, 700)" in about_item
        assert f"{late / file}, row group 1: column 'history_times': must lie strictly before" in about_time
    assert list((tmp_path / "out").iterdir()) == []


def test_a_nan_in_an_embedding_is_refused(encoder: Path, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "dataset")
    file = path / "items/part-00001.parquet"
    table = pa.concat_tables(read_row_group(group) for group in row_groups([file]))
    x_ND = np.ones((len(table), 16), np.float16)
    x_ND[200, 5] = np.nan
    at = table.column_names.index("text_embedding")
    spoiled = table.set_column(at, "text_embedding", embedding_column(x_ND, np.zeros(len(x_ND), bool)))
    write_table(file, spoiled, 90)
    with pytest.raises(DataError, match="must be finite") as refused:
        materialize_dataset(LOCAL, path, encoder, tmp_path / "out")
    assert f"{file}, row group 2: column 'text_embedding'" in str(refused.value)


def test_a_dataset_of_other_signals_is_refused(encoder: Path, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "dataset")
    spec = json.loads((path / "dataset.json").read_text())
    spec["categoricals"]["brand"] = 13
    (path / "dataset.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match="signal 'brand' has size 13, the encoder takes 12"):
        materialize_dataset(LOCAL, path, encoder, tmp_path / "out")
