"""Stage `materialize` on a store with earlier SIDs: existing partitions are reused, only missing ones are written."""

import re
import shutil
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidestack.infra.partitions import LISTS
from sidestack.infra.snapshot import read_dataset
from tests.datasets import joined
from tests.encoder.fabricated import (
    BARE_ITEMS,
    DAYS,
    LOCAL,
    SPEC,
    events,
    item_parts,
    item_table,
    materialize_dataset,
    replaced,
    train_encoder,
    write_dataset,
)
from tests.encoder.sid_tables import OTHER, copied, encoded, expected_digits, listed, packed, sids_of


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
