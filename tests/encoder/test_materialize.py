"""Stage `materialize`: right SIDs in every column, nothing made twice, the same bytes however the work is shared."""

import json
import re
import shutil
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.encoding import encode
from sidestack.encoder.sid.columns import event_columns, read_sid_spec, require_spec, sid_columns
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_codebook import read_codebook
from sidestack.encoder.sid_map import NULL
from sidestack.encoder.signals import signal_batch
from sidestack.infra.distributed import World
from sidestack.infra.errors import CommitError, ConfigError, DataError, SpecError, StageError
from sidestack.infra.parquet import row_groups
from sidestack.infra.partitions import LISTS
from sidestack.infra.snapshot import read_dataset
from tests.datasets import content, joined
from tests.distributed import run_distributed
from tests.encoder.fabricated import (
    BARE_ITEMS,
    BARE_USERS,
    DAYS,
    LOCAL,
    SPEC,
    edit,
    embedding_column,
    events,
    item_parts,
    item_table,
    materialize_dataset,
    replaced,
    train_encoder,
    users,
    write_dataset,
)

CPU = torch.device("cpu")
OTHER = {
    "quantizer": {"kind": "rqvae", "codes": 16, "depth": 2, "groups": 1, "group_dim": 6},
    "training": {"epochs": 1},
}


@pytest.fixture(scope="module")
def other_encoder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("other") / "encoder"
    train_encoder(LOCAL, dataset, out, OTHER)
    return out


@pytest.fixture
def fresh(dataset: Path, tmp_path: Path) -> Path:
    """Return a copy of the dataset and its store, without SIDs."""
    return copied(dataset, tmp_path / "dataset")


def copied(dataset: Path, to: Path) -> Path:
    shutil.copytree(dataset, to)
    return to


def sids_of(path: Path, base: str = "items", name: str = "sid") -> pa.Table:
    """Read the SID columns beside a table."""
    dataset = read_dataset(path)
    return content(dataset, dataset.snapshot.sids[name].table(name, base))


def listed(path: Path, beginning: str = "") -> dict[str, str]:
    """Return the paths and digests of a snapshot's partitions, by table and slice."""
    entries = [entry for entry in read_dataset(path).snapshot.partitions if entry.table.startswith(beginning)]
    return {f"{entry.table} {entry.slice}": f"{entry.path} {entry.digest}" for entry in entries}


def stamps(path: Path) -> Mapping[str, int]:
    """Return when each file of a snapshot's store was written, by its path in it."""
    store = read_dataset(path).store
    return {str(file.relative_to(store)): file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}


def made_since(before: Mapping[str, int], path: Path) -> set[str]:
    """Return table and slice of the partitions written since `before`.

    Check that all other files are unchanged, and that there are no more new lists of partitions than tables.
    """
    after = stamps(path)
    assert {file: after.get(file) for file in before} == dict(before)
    new = after.keys() - before.keys()
    made = {re.sub(r"/\w{16}/[^/]+$", "", file) for file in new if not file.startswith(LISTS)}
    assert sum(file.startswith(LISTS) for file in new) <= len({name.rpartition("/")[0] for name in made})
    return made


def encoded(path: Path) -> int:
    """Return how many rows the stage encoded."""
    number: int = json.loads((path / "summary.json").read_text())["encoded"]
    return number


def expected_digits(encoder: Path, table: pa.Table) -> list[list[int] | None]:
    """Encode items one by one, without blocks, map or packing."""
    bundle = load_bundle(encoder, CPU)
    batch = signal_batch(table, bundle.signals)
    rows = [bundle.model.digits(batch.sliced(i, i + 1))[0].tolist() for i in range(len(batch))]
    return [row if present else None for row, present in zip(rows, batch.any_present.tolist(), strict=True)]


def packed(digits: list[int] | None, length: int | None = None) -> int | None:
    """Return ternary digits as one number, the first digit most significant."""
    return None if digits is None else int("".join(map(str, digits[:length])), 3)


def load_bundle_spec(materialized: Path, name: str = "sid") -> SidSpec:
    return read_sid_spec(sids_of(materialized, name=name).schema.field(name))


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


def test_existing_partitions_are_reused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    materialize_dataset(LOCAL, fresh, encoder, tmp_path / "first")
    before = stamps(fresh)
    materialize_dataset(LOCAL, fresh, encoder, tmp_path / "second", {"batch_size": 256})
    assert made_since(before, fresh) == set()
    assert encoded(tmp_path / "second") == 0
    assert listed(tmp_path / "second") == listed(tmp_path / "first")


def test_second_sid_set_writes_only_its_own_partitions(
    fresh: Path, encoder: Path, other_encoder: Path, tmp_path: Path
) -> None:
    materialize_dataset(LOCAL, fresh, encoder, tmp_path / "one")
    before = stamps(fresh)
    materialize_dataset(LOCAL, fresh, {"sid": encoder, "code": other_encoder}, tmp_path / "both")
    generation = read_dataset(tmp_path / "both").snapshot.sids["code"].generation
    assert made_since(before, fresh) == {
        *(f"sids/code/{generation}/items/part={number:05d}" for number in (0, 1)),
        *(f"sids/code/{generation}/{base}/date={day}" for base in ("events", "requests") for day in DAYS),
    }
    assert encoded(tmp_path / "both") == 700
    after = listed(tmp_path / "both")
    assert {name: after[name] for name in listed(tmp_path / "one")} == listed(tmp_path / "one")


def test_snapshot_with_sids_accepts_another_set(
    materialized: Path, dataset: Path, encoder: Path, other_encoder: Path, tmp_path: Path
) -> None:
    shutil.copytree(materialized.parent, tmp_path / "copy")
    materialize_dataset(LOCAL, tmp_path / "copy/out", {"code": other_encoder}, tmp_path / "copy/later")
    together = copied(dataset, tmp_path / "dataset")
    materialize_dataset(LOCAL, together, {"sid": encoder, "code": other_encoder}, tmp_path / "both")
    assert listed(tmp_path / "copy/later") == listed(tmp_path / "both")


def test_changed_encoder_writes_a_new_generation_of_its_own_set_only(
    fresh: Path, dataset: Path, encoder: Path, other_encoder: Path, tmp_path: Path
) -> None:
    materialize_dataset(LOCAL, fresh, {"sid": encoder, "code": other_encoder}, tmp_path / "first")
    train_encoder(LOCAL, dataset, tmp_path / "changed", {**OTHER, "training": {"epochs": 1, "seed": 3}})
    before = stamps(fresh)
    materialize_dataset(LOCAL, fresh, {"sid": encoder, "code": tmp_path / "changed"}, tmp_path / "second")
    first, second = (read_dataset(tmp_path / name).snapshot.sids for name in ("first", "second"))
    assert second["sid"] == first["sid"] and second["code"].generation != first["code"].generation
    made = made_since(before, fresh)
    assert len(made) == 6
    assert all(name.startswith(f"sids/code/{second['code'].generation}/") for name in made)
    assert sids_of(tmp_path / "second", name="code")["code"] != sids_of(tmp_path / "first", name="code")["code"]


def more_items(number: int = 50) -> pa.Table:
    """Return additional items that have the signals of the first ones."""
    return replaced(item_table().slice(0, number), "item_id", pa.array(np.arange(number) + SPEC.num_items))


def revised(ids: list[int], like: int) -> pa.Table:
    """Return rows that revise the items `ids`, all to the signals of item `like`."""
    rows = item_table().take(pa.array([like] * len(ids)))
    return replaced(rows, "item_id", pa.array(ids))


def test_only_the_added_part_of_items_is_encoded(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    materialize_dataset(LOCAL, fresh, encoder, tmp_path / "first")
    grown = write_dataset(tmp_path / "grown", [*item_parts(), more_items()], store=fresh / "store")
    before = stamps(fresh)
    materialize_dataset(LOCAL, grown, encoder, tmp_path / "second")
    generation = read_dataset(tmp_path / "second").snapshot.sids["sid"].generation
    assert made_since(before, fresh) == {f"sids/sid/{generation}/items/part=00002"}
    assert encoded(tmp_path / "second") == 50
    sids = sids_of(tmp_path / "second")["sid"].to_pylist()
    assert sids[:700] == sids_of(tmp_path / "first")["sid"].to_pylist()
    assert sids[700:] == [packed(row) for row in expected_digits(encoder, item_table().slice(0, 50))]


def test_new_items_have_sids_on_the_dates_that_show_them(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    materialize_dataset(LOCAL, fresh, encoder, tmp_path / "first")
    later = date(2024, 1, 3)
    rows = events(later)
    shown = replaced(rows, "item_id", pa.array(np.arange(rows.num_rows) % 750))
    days = {**{day: events(day) for day in DAYS}, later: shown}
    grown = write_dataset(tmp_path / "grown", [*item_parts(), more_items()], days, store=fresh / "store")
    materialize_dataset(LOCAL, grown, encoder, tmp_path / "second")
    digits = expected_digits(encoder, pa.concat_tables([item_table(), more_items()]))
    found = joined(tmp_path / "second", ["item_sid"], later, later)["item_sid"].to_pylist()
    assert found == [packed(digits[item]) for item in shown["item_id"].to_pylist()]


def test_revised_items_keep_their_published_sids(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    materialize_dataset(LOCAL, fresh, encoder, tmp_path / "first")
    published = sids_of(tmp_path / "first")["sid"].to_pylist()
    ids = [2, 5, BARE_ITEMS[0], 650]
    assert len({published[item] for item in ids}) == 4  # one of them is null, and stays null
    part = pa.concat_tables([revised(ids, like=100), more_items()])
    later = date(2024, 1, 3)
    shown = replaced(events(later), "item_id", pa.array(np.resize([*ids, 700, 749], 200)))
    days = {**{day: events(day) for day in DAYS}, later: shown}
    grown = write_dataset(tmp_path / "grown", [*item_parts(), part], days, store=fresh / "store")
    before = stamps(fresh)
    materialize_dataset(LOCAL, grown, encoder, tmp_path / "second")
    generation = read_dataset(tmp_path / "second").snapshot.sids["sid"].generation
    assert made_since(before, fresh) == {
        f"sids/sid/{generation}/items/part=00002",
        *(f"sids/sid/{generation}/{base}/date={later}" for base in ("events", "requests")),
    }
    sids = sids_of(tmp_path / "second")["sid"].to_pylist()
    assert sids[:700] == published
    assert sids[700:704] == [published[item] for item in ids]  # aligned with the revising rows
    assert sids[704:] == published[:50]  # SIDs of the items with the same signals
    current = [*published, *sids[704:]]
    found = joined(tmp_path / "second", ["item_sid"], later, later)["item_sid"].to_pylist()
    assert found == [current[item] for item in shown["item_id"].to_pylist()]


def test_added_date_writes_only_its_own_columns(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    materialize_dataset(LOCAL, fresh, encoder, tmp_path / "first")
    later = date(2024, 1, 3)
    days = {day: events(day) for day in (*DAYS, later)}
    grown = write_dataset(tmp_path / "grown", days=days, store=fresh / "store")
    before = stamps(fresh)
    materialize_dataset(LOCAL, grown, encoder, tmp_path / "second")
    generation = read_dataset(tmp_path / "second").snapshot.sids["sid"].generation
    assert made_since(before, fresh) == {
        f"sids/sid/{generation}/{base}/date={later}" for base in ("events", "requests")
    }
    assert encoded(tmp_path / "second") == 0
    at_once = write_dataset(tmp_path / "at-once", days=days)
    materialize_dataset(LOCAL, at_once, encoder, tmp_path / "third")
    assert listed(tmp_path / "second") == listed(tmp_path / "third")


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


@pytest.mark.parametrize(
    ("table", "column"), [("items", "brand"), ("events", "item_id"), ("requests", "history_item_ids")]
)
def test_missing_column_is_named_in_the_error(
    fresh: Path, encoder: Path, tmp_path: Path, table: str, column: str
) -> None:
    file, *_ = edit(fresh, table, lambda rows: rows.drop_columns([column]))
    with pytest.raises(DataError, match=rf"{file}, row group 0: column '{column}' is missing"):
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out")


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


def test_a_codebook_of_another_encoder_is_refused(materialized: Path) -> None:
    spec = load_bundle_spec(materialized)
    with pytest.raises(SpecError, match=r"sid.safetensors: fingerprint .*the SIDs 'sid' have abab"):
        read_codebook(materialized, spec.model_copy(update={"fingerprint": "ab" * 32}))
    with pytest.raises(DataError, match="cannot be read as the codebook of the SIDs 'other'"):
        read_codebook(materialized, spec.model_copy(update={"name": "other"}))


def test_prefix_lengths_of_an_unknown_encoder_are_refused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefix_lengths.other: no encoder of this name; given are sid"):
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out", {"prefix_lengths": {"other": [2]}})


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


def test_a_prefix_longer_than_the_sid_is_refused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefix_lengths \(5, 10\) must rise within 1..6"):
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out", {"prefix_lengths": {"sid": [5, 10]}})


def test_a_dataset_with_sids_of_that_name_is_refused(materialized: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has SIDs 'sid' already"):
        materialize_dataset(LOCAL, materialized, encoder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_altered_encoder_is_refused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(encoder, tmp_path / "altered"))
    text = (altered / "encoder.json").read_text()
    found = load_bundle(encoder, CPU).spec.fingerprint
    (altered / "encoder.json").write_text(text.replace(found, "0" * 64))
    with pytest.raises(SpecError, match="fingerprint of these weights"):
        materialize_dataset(LOCAL, fresh, altered, tmp_path / "out")


def alter(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)


@pytest.mark.parametrize("how", ["altered", "gone", "another"])
@pytest.mark.parametrize("table", ["items", "events", "requests"])
def test_partition_that_differs_from_the_snapshot_is_refused_and_leaves_no_files(
    fresh: Path, encoder: Path, tmp_path: Path, table: str, how: str
) -> None:
    dataset = read_dataset(fresh)
    *_, entry = dataset.partitions(table)
    folder = dataset.store / entry.path
    if how == "altered":
        alter(folder / entry.files[0].name)
    elif how == "gone":
        shutil.rmtree(folder)
    else:  # a complete partition, but with other rows than those listed
        (other, *_) = dataset.partitions(table)
        shutil.rmtree(folder)
        shutil.copytree(dataset.store / other.path, folder)
    with pytest.raises(CommitError, match=re.escape(str(folder))):
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    made = {file.parent for file in (fresh / "store/sids").rglob("*.parquet")}
    assert all((place / "manifest.json").exists() for place in made)
    assert not any(table in place.parts and entry.slice in place.parts for place in made)


def failures(world: World, encoder: Path, out: Path, *datasets: Path) -> list[str]:
    messages = []
    for dataset in datasets:
        with pytest.raises((CommitError, DataError, StageError)) as refused:
            materialize_dataset(world, dataset, encoder, out)
        messages.append(str(refused.value))
    return messages


def with_value(column: pa.ChunkedArray, row: int, value: Any) -> pa.Array:
    values = column.to_pylist()
    values[row] = value
    return pa.array(values, column.type)


def test_invalid_rows_raise_on_both_ranks_and_leave_no_output(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    shown, remembered, altered = (copied(fresh, tmp_path / name) for name in ("shown", "remembered", "altered"))

    def show_an_unknown_item(rows: pa.Table) -> pa.Table:
        return replaced(rows, "item_id", with_value(rows["item_id"], 100, 700))

    def add_an_unknown_item_to_a_history(rows: pa.Table) -> pa.Table:
        return replaced(rows, "history_item_ids", with_value(rows["history_item_ids"], 60, [3, -1]))

    (shown_file,) = edit(shown, "events", show_an_unknown_item, f"date={DAYS[1]}")
    (remembered_file,) = edit(remembered, "requests", add_an_unknown_item_to_a_history, f"date={DAYS[1]}")
    items = read_dataset(altered).files("items")[-1].path
    alter(items)
    out = tmp_path / "out" / "tables"
    for about_item, about_history, about_file in run_distributed(failures, encoder, out, shown, remembered, altered):
        rule = r"is outside the table \[0, 700\)"
        assert re.search(rf"{shown_file}, row group [1-9]: column 'item_id': id 700 {rule}", about_item)
        history = rf"{remembered_file}, row group [1-9]: column 'history_item_ids': id -1 {rule}"
        assert re.search(history, about_history)
        assert f"{items}: SHA-256" in about_file
    assert list((tmp_path / "out").iterdir()) == []


def test_a_nan_in_an_embedding_is_refused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    def spoil(rows: pa.Table) -> pa.Table:
        x_ND = np.ones((len(rows), 16), np.float16)
        x_ND[200, 5] = np.nan
        return replaced(rows, "text_embedding", embedding_column(x_ND, np.zeros(len(x_ND), bool)))

    file, _ = edit(fresh, "items", spoil, "part=00001")
    with pytest.raises(DataError, match="must be finite") as refused:
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out")
    assert f"{file}, row group 2: column 'text_embedding'" in str(refused.value)


def test_a_dataset_of_other_signals_is_refused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    spec = json.loads((fresh / "dataset.json").read_text())
    spec["categoricals"]["brand"] = 13
    (fresh / "dataset.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match="signal 'brand' has size 13, the encoder takes 12"):
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out")
