"""Stage `materialize`: SIDs in every column, and the same bytes for any batch size and number of ranks."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.encoding import encode
from sidestack.encoder.sid.columns import event_columns, read_sid_spec, require_spec, sid_columns
from sidestack.encoder.sid_codebook import read_codebook
from sidestack.encoder.sid_map import NULL
from sidestack.encoder.signals import signal_batch
from sidestack.infra.parquet import row_groups
from sidestack.infra.snapshot import read_dataset
from tests.datasets import content, joined
from tests.distributed import run_distributed
from tests.encoder.fabricated import (
    BARE_ITEMS,
    BARE_USERS,
    DAYS,
    LOCAL,
    SPEC,
    events,
    item_parts,
    item_table,
    materialize_dataset,
    replaced,
    train_encoder,
    users,
    write_dataset,
)
from tests.encoder.sid_tables import encoded, expected_digits, listed, load_bundle_spec, packed, sids_of

CPU = torch.device("cpu")


def test_items_have_a_column_of_sids(materialized: Path, encoder: Path) -> None:
    digits = expected_digits(encoder, item_table())
    sids = sids_of(materialized)
    assert sids.column_names == ["sid"] and sids["sid"].type == pa.int64()
    assert sids["sid"].to_pylist() == [packed(row) for row in digits]
    assert [i for i, sid in enumerate(sids["sid"].to_pylist()) if sid is None] == list(BARE_ITEMS)


def test_impressions_carry_item_and_history_sids_whole_and_by_prefix(
    materialized: Path, dataset: Path, encoder: Path
) -> None:
    digits = expected_digits(encoder, item_table())
    rows, before = joined(materialized), joined(dataset)
    assert rows.select(before.column_names).equals(before)
    for suffix, length in (("", None), ("_prefix_2", 2), ("_prefix_4", 4)):
        found = rows[f"item_sid{suffix}"].to_pylist()
        assert found == [packed(digits[i], length) for i in before["item_id"].to_pylist()]
        histories = rows[f"history_sids{suffix}"].to_pylist()
        wanted = [[packed(digits[i], length) for i in row] for row in before["history_item_ids"].to_pylist()]
        assert histories == wanted
        assert any(None in row for row in histories)
        assert None in found
    assert set(rows.column_names) == {*before.column_names, *event_columns(load_bundle_spec(materialized))}


@pytest.mark.parametrize("base", ["items", "events", "requests"])
def test_sid_columns_have_the_row_groups_of_their_table(materialized: Path, base: str) -> None:
    dataset = read_dataset(materialized)
    own, beside = (dataset.files(name) for name in (base, dataset.snapshot.sids["sid"].table("sid", base)))
    assert [(file.path.name, file.rows) for file in own] == [(file.path.name, file.rows) for file in beside]
    sizes = [[group.rows for group in row_groups([file.path for file in files])] for files in (own, beside)]
    assert sizes[0] == sizes[1] and len(sizes[0]) > len(own)


def test_spec_and_fingerprint_are_in_every_column(materialized: Path, encoder: Path) -> None:
    trained = load_bundle(encoder, CPU).spec
    spec = load_bundle_spec(materialized)
    assert spec == trained.model_copy(update={"prefix_lengths": (2, 4, 6)})
    dataset = read_dataset(materialized)
    known = {**event_columns(spec), **sid_columns("sid", spec)}
    found = []
    for base, names in dataset.snapshot.sids["sid"].columns.items():
        for file in dataset.files(dataset.snapshot.sids["sid"].table("sid", base)):
            assert pq.read_schema(file.path).names == list(names)
            for name in names:
                require_spec(pq.read_schema(file.path), name, known[name], file.path)
                found.append(name)
    assert set(found) == set(known)


def test_snapshot_lists_input_and_sid_partitions_and_output_has_no_table(materialized: Path, dataset: Path) -> None:
    after = listed(materialized)
    assert {name: after[name] for name in listed(dataset)} == listed(dataset)
    assert {name.split()[0].rsplit("/", 1)[-1] for name in after.keys() - listed(dataset).keys()} == {
        "items", "events", "requests",
    }  # fmt: skip
    assert (materialized / "dataset.json").read_bytes() == (dataset / "dataset.json").read_bytes()
    assert {path.name for path in materialized.iterdir()} <= {
        "snapshot.json", "dataset.json", "codebooks", "sids", "manifest.json", "summary.json", "config.yaml",
        "history.jsonl",
    }  # fmt: skip
    assert not list(materialized.rglob("*.parquet"))
    summary = json.loads((materialized / "summary.json").read_text())
    sids = [sid for sid in sids_of(materialized)["sid"].to_pylist() if sid is not None]
    found = summary["sids"]["sid"]
    assert (summary["items"], summary["encoded"], found["null"]) == (700, 700, 3)
    assert found["distinct"] == len(set(sids))
    assert found["unique_share"] == pytest.approx(len(set(sids)) / 697)


@pytest.mark.parametrize("batch_size", [1, 300, 100_000])
def test_any_batch_size_gives_the_same_bytes(
    materialized: Path, fresh: Path, encoder: Path, tmp_path: Path, batch_size: int
) -> None:
    materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out", {"batch_size": batch_size})
    assert encoded(tmp_path / "out") == 700
    assert listed(tmp_path / "out") == listed(materialized)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same_bytes(
    materialized: Path, fresh: Path, encoder: Path, tmp_path: Path, world_size: int
) -> None:
    run_distributed(materialize_dataset, fresh, encoder, tmp_path / "out", world_size=world_size)
    assert encoded(tmp_path / "out") == 700
    assert listed(tmp_path / "out") == listed(materialized)


def test_stored_precision_does_not_change_sids(materialized: Path, encoder: Path, tmp_path: Path) -> None:
    """Compare float16 with the same values stored as float32."""
    wide = write_dataset(tmp_path / "wide", item_parts(as_float32(item_table())))
    materialize_dataset(LOCAL, wide, encoder, tmp_path / "out")
    assert content(read_dataset(wide), "items")["text_embedding"].type.value_type == pa.float32()
    assert sids_of(tmp_path / "out").equals(sids_of(materialized))
    assert joined(tmp_path / "out").equals(joined(materialized))


def as_float32(table: pa.Table) -> pa.Table:
    for name, dim in SPEC.embeddings.items():
        table = replaced(table, name, table[name].cast(pa.list_(pa.float32(), dim)))
    return table


def test_id_depends_only_on_its_own_signals(encoder: Path) -> None:
    """Other items, their order, the position in a block and the stored precision have no effect."""
    bundle = load_bundle(encoder, CPU)
    table = item_table()
    ids_NC = encode(bundle, bundle.spec, signal_batch(table, bundle.signals))
    order = np.random.default_rng(0).permutation(len(table))[:431]
    shuffled_NC = encode(bundle, bundle.spec, signal_batch(table.take(pa.array(order)), bundle.signals))
    assert np.array_equal(shuffled_NC, ids_NC[order])
    wide = signal_batch(as_float32(table), bundle.signals)
    assert np.array_equal(encode(bundle, bundle.spec, wide), ids_NC)
    assert (ids_NC[list(BARE_ITEMS)] == NULL).all()


def test_long_sids_take_several_columns(fresh: Path, tmp_path: Path) -> None:
    quantizer = {"kind": "structured", "levels": 256, "groups": 1, "depth": 9, "group_dim": 6}
    train_encoder(LOCAL, fresh, tmp_path / "encoder", {"quantizer": quantizer, "training": {"epochs": 1}})
    changes = {"prefix_lengths": {"sid": [3, 8]}}
    materialize_dataset(LOCAL, fresh, tmp_path / "encoder", tmp_path / "out", changes)
    spec = load_bundle_spec(tmp_path / "out")
    sids, rows = sids_of(tmp_path / "out"), joined(tmp_path / "out")
    assert read_dataset(tmp_path / "out").snapshot.sids["sid"].columns == {
        "items": ("sid", "sid_1"),
        "events": ("item_sid", "item_sid_1", "item_sid_prefix_3", "item_sid_prefix_8", "item_sid_prefix_8_1"),
        "requests": (
            "history_sids", "history_sids_1", "history_sids_prefix_3", "history_sids_prefix_8",
            "history_sids_prefix_8_1",
        ),
    }  # fmt: skip
    known = sids.filter(sids["sid"].is_valid())
    ids_NC = torch.stack([torch.from_numpy(known[name].to_numpy()) for name in ("sid", "sid_1")], dim=-1)
    alone = [row for row in expected_digits(tmp_path / "encoder", item_table()) if row is not None]
    # With steps this fine, some rows encoded one by one get a neighbouring code: the reason for BLOCK_ROWS.
    same = [found == row for found, row in zip(spec.unpack(ids_NC).tolist(), alone, strict=True)]
    assert np.mean(same) > 0.98
    first, second = (sids[name].to_pylist() for name in ("sid", "sid_1"))
    items = rows["item_id"].to_pylist()
    assert rows["item_sid_1"].to_pylist() == [second[item] for item in items]
    wanted = [None if first[item] is None else first[item] // 256**4 for item in items]
    assert rows["item_sid_prefix_3"].to_pylist() == wanted
    histories = [[first[item] for item in row] for row in rows["history_item_ids"].to_pylist()]
    assert rows["history_sids"].to_pylist() == histories


def test_packing_of_the_paper_gives_ids_by_equation_5(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out", {"packing": "paper_eq5"})
    sids = sids_of(tmp_path / "out")["sid"].to_pylist()
    digits = expected_digits(encoder, item_table())
    eq5 = [None if row is None else sum(3**k * g for k, g in enumerate(row, start=1)) for row in digits]
    assert sids == eq5
    rows = joined(tmp_path / "out", ["item_id", "item_sid_prefix_2"])
    wanted = [None if digits[i] is None else 3 * digits[i][0] + 9 * digits[i][1] for i in rows["item_id"].to_pylist()]
    assert rows["item_sid_prefix_2"].to_pylist() == wanted


def test_several_encoders_write_the_same_sids_as_each_alone(
    materialized: Path, fresh: Path, encoder: Path, other_encoder: Path, tmp_path: Path
) -> None:
    changes = {"prefix_lengths": {"code": [1]}}
    materialize_dataset(LOCAL, fresh, {"sid": encoder, "code": other_encoder}, tmp_path / "both", changes)
    both, one = joined(tmp_path / "both"), joined(materialized)
    assert set(both.column_names) - set(one.column_names) == {
        "item_code", "item_code_prefix_1", "history_codes", "history_codes_prefix_1",
    }  # fmt: skip
    assert both.select(one.column_names).equals(one)
    bundle = load_bundle(other_encoder, CPU)
    spec = read_sid_spec(both.schema.field("item_code"))
    assert spec == bundle.spec.model_copy(update={"name": "code", "prefix_lengths": (1,)})
    digits = expected_digits(other_encoder, item_table())
    wanted = [None if row is None else 16 * row[0] + row[1] for row in digits]
    assert sids_of(tmp_path / "both", name="code")["code"].to_pylist() == wanted
    assert torch.equal(read_codebook(tmp_path / "both", spec), bundle.model.quantizer.codewords())


def test_user_sids_are_written_beside_users_and_requests(
    materialized: Path, fresh: Path, encoder: Path, tmp_path: Path
) -> None:
    changes = {"entity": "user", "training": {"epochs": 1, "batch_size": 8, "holdout_share": 0.3}}
    train_encoder(LOCAL, fresh, tmp_path / "habits", changes)
    encoders, lengths = {"sid": encoder, "habit": tmp_path / "habits"}, {"prefix_lengths": {"habit": [2]}}
    materialize_dataset(LOCAL, fresh, encoders, tmp_path / "out", lengths)
    people, log = sids_of(tmp_path / "out", "users", "habit"), joined(tmp_path / "out")
    spec = read_sid_spec(people.schema.field("habit"))
    assert (spec.entity, spec.name) == ("user", "habit")
    assert read_dataset(tmp_path / "out").snapshot.sids["habit"].columns == {
        "users": ("habit",), "requests": ("user_habit", "user_habit_prefix_2"),
    }  # fmt: skip
    wanted = [packed(row) for row in expected_digits(tmp_path / "habits", users())]
    assert people["habit"].to_pylist() == wanted
    assert [user for user, sid in enumerate(wanted) if sid is None] == list(BARE_USERS)
    before = joined(materialized)
    assert set(log.column_names) - set(before.column_names) == {"user_habit", "user_habit_prefix_2"}
    assert log.select(before.column_names).equals(before)
    assert log["user_habit"].to_pylist() == [wanted[user] for user in log["user_id"].to_pylist()]
    assert listed(tmp_path / "out", "sids/sid/") == listed(materialized, "sids/sid/")


def test_a_day_without_events_has_the_sid_columns(encoder: Path, tmp_path: Path) -> None:
    empty = DAYS[1]
    days = {DAYS[0]: events(DAYS[0]), empty: events(empty).slice(0, 0)}
    materialize_dataset(LOCAL, write_dataset(tmp_path / "dataset", days=days), encoder, tmp_path / "out")
    dataset = read_dataset(tmp_path / "out")
    found = set()
    for base in ("events", "requests"):
        (file,) = dataset.files(dataset.snapshot.sids["sid"].table("sid", base), empty, empty)
        schema = pq.read_schema(file.path)
        assert file.rows == 0
        for name in schema.names:
            require_spec(schema, name, event_columns(load_bundle_spec(tmp_path / "out"))[name], file.path)
            found.add(name)
    assert found == set(event_columns(load_bundle_spec(tmp_path / "out")))
    assert len(joined(tmp_path / "out")) == 200
