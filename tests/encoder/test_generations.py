"""Published SIDs over cycles of retraining: appended to, kept under a refreshed encoder, moved to it, or rebuilt."""

import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.encoding import encode
from sidestack.encoder.generation import sets
from sidestack.encoder.published import encoder_of
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_codebook import read_codebook
from sidestack.encoder.sid_map import MAP_FILE, NULL
from sidestack.encoder.signals import signal_batch
from sidestack.infra.errors import CommitError, DataError
from sidestack.infra.snapshot import Dataset, Encoding, SidSet, read_dataset
from tests.datasets import content, joined
from tests.distributed import run_distributed
from tests.encoder.fabricated import (
    BARE_ITEMS,
    DAYS,
    LOCAL,
    MATERIALIZE,
    SPEC,
    edit,
    events,
    item_parts,
    item_table,
    materialize_dataset,
    replaced,
    train_encoder,
    write_dataset,
)

CPU = torch.device("cpu")
CYCLES = 5
MOVE = {"published": "move"}


@pytest.fixture(scope="module")
def refreshed(dataset: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return encoders, each refreshed from the previous one; the first began the generation."""
    folder = tmp_path_factory.mktemp("refreshed")
    encoders = [encoder]
    for number in range(CYCLES):
        changes = {"training": {"epochs": 2, "seed": number + 1}}
        train_encoder(LOCAL, dataset, folder / str(number), changes, start=encoders[-1])
        encoders.append(folder / str(number))
    return encoders


@pytest.fixture(scope="module")
def rebuilt(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rebuilt") / "encoder"
    train_encoder(LOCAL, dataset, out, {"training": {"seed": 7}})
    return out


def later_items(cycle: int, number: int = 60) -> pa.Table:
    """Return the part of items that a cycle adds: the signals of earlier items, in another order each cycle."""
    like_N = np.random.default_rng(cycle).permutation(SPEC.num_items)[:number]
    first = SPEC.num_items + cycle * number
    return replaced(item_table().take(pa.array(like_N)), "item_id", pa.array(np.arange(first, first + number)))


def grown(folder: Path, store: Path, cycles: int, parts: Sequence[pa.Table] = ()) -> Path:
    """Write the snapshot after `cycles` cycles; each added a part of items and a date that shows them."""
    items = [*item_parts(), *(parts or map(later_items, range(cycles)))]
    days = {day: events(day) for day in DAYS}
    for cycle in range(cycles):
        day = DAYS[-1] + timedelta(days=cycle + 1)
        shown = np.random.default_rng(day.day).integers(0, SPEC.num_items + 60 * (cycle + 1), 200)
        days[day] = replaced(events(day), "item_id", pa.array(shown))
    return write_dataset(folder, items, days, store=store)


def set_of(path: Path) -> tuple[Dataset, SidSet]:
    dataset = read_dataset(path)
    return dataset, dataset.snapshot.sids["sid"]


def map_of(path: Path) -> bytes:
    """Return the bytes of a snapshot's map from id to SID."""
    dataset, listed = set_of(path)
    entries = dataset.partitions(listed.table("sid", "items"))
    return b"".join((dataset.store / entry.path / MAP_FILE).read_bytes() for entry in entries)


def sids_of(path: Path) -> list[int]:
    return np.frombuffer(map_of(path), np.int64).tolist()


def columns_of(path: Path, day: date) -> dict[str, str]:
    """Return paths and digests of a date's SID columns, by table."""
    return {
        entry.table: f"{entry.path} {entry.digest}"
        for entry in read_dataset(path).on_date(day)
        if entry.table.startswith("sids/")
    }


def summary_of(path: Path) -> Any:
    return json.loads((path / "summary.json").read_text())


def encoded_by(encoder: Path, items: pa.Table) -> list[int]:
    bundle = load_bundle(encoder, CPU)
    ids: list[int] = encode(bundle, bundle.spec, signal_batch(items, bundle.signals))[:, 0].tolist()
    return ids


def revision(encoder: Path) -> str:
    return load_bundle(encoder, CPU).revision


def require_sids_of_impressions(path: Path) -> None:
    """Check that every impression carries the SIDs that the map has for its item and its history."""
    sids = [None if sid == NULL else sid for sid in sids_of(path)]
    rows = joined(path, ["item_id", "item_sid", "item_sid_prefix_2", "history_item_ids", "history_sids"])
    found = [sids[item] for item in rows["item_id"].to_pylist()]
    assert rows["item_sid"].to_pylist() == found
    assert rows["item_sid_prefix_2"].to_pylist() == [None if sid is None else sid // 3**4 for sid in found]
    histories = rows["history_item_ids"].to_pylist()
    assert rows["history_sids"].to_pylist() == [[sids[item] for item in row] for row in histories]


@pytest.mark.slow
def test_append_changes_no_published_sid_over_thirty_nights(tmp_path: Path, encoder: Path) -> None:
    published = b""
    for cycle in range(30 + 1):
        out = tmp_path / f"sids-{cycle}"
        materialize_dataset(LOCAL, grown(tmp_path / str(cycle), tmp_path / "store", cycle), encoder, out)
        assert map_of(out).startswith(published)
        assert len(map_of(out)) - len(published) == 8 * (60 if cycle else SPEC.num_items)
        assert summary_of(out)["encoded"] == (60 if cycle else SPEC.num_items)
        published = map_of(out)
        assert set_of(out)[1].encodings == (Encoding(first=0, revision=revision(encoder)),)
    require_sids_of_impressions(out)


def test_keep_changes_no_published_sid_over_five_parts_of_five_encoders(tmp_path: Path, refreshed: list[Path]) -> None:
    outs = [tmp_path / f"sids-{cycle}" for cycle in range(CYCLES + 1)]
    materialize_dataset(LOCAL, grown(tmp_path / "0", tmp_path / "store", 0), refreshed[0], outs[0])
    for cycle in range(1, CYCLES + 1):
        dataset = grown(tmp_path / str(cycle), tmp_path / "store", cycle)
        materialize_dataset(LOCAL, dataset, refreshed[cycle], outs[cycle], published=outs[cycle - 1])
        before, after = map_of(outs[cycle - 1]), map_of(outs[cycle])
        assert after.startswith(before)
        new = later_items(cycle - 1)
        assert np.frombuffer(after[len(before) :], np.int64).tolist() == encoded_by(refreshed[cycle], new)
        # The encoders must differ, or the test would pass with either of them.
        assert encoded_by(refreshed[cycle], new) != encoded_by(refreshed[0], new)
        summary = summary_of(outs[cycle])
        assert summary["encoded"] == 60
        assert set(summary["sids"]["sid"]["moved"].values()) == {0.0}
        for day in read_dataset(outs[cycle - 1]).dates():
            assert columns_of(outs[cycle], day) == columns_of(outs[cycle - 1], day)
    _, listed = set_of(outs[-1])
    assert listed.generation == set_of(outs[0])[1].generation
    assert [one.revision for one in listed.encodings] == [revision(path) for path in refreshed]
    assert [one.first for one in listed.encodings] == [0, *(SPEC.num_items + 60 * cycle for cycle in range(CYCLES))]
    require_sids_of_impressions(outs[-1])


def test_repeated_cycle_gives_the_same_snapshot_after_other_outputs(tmp_path: Path, refreshed: list[Path]) -> None:
    store = tmp_path / "store"
    materialize_dataset(LOCAL, grown(tmp_path / "0", store, 0), refreshed[0], tmp_path / "first")
    dataset = grown(tmp_path / "1", store, 1)
    for name, number in (("second", 1), ("other", 2), ("again", 1)):
        materialize_dataset(LOCAL, dataset, refreshed[number], tmp_path / name, published=tmp_path / "first")
    assert map_of(tmp_path / "again") == map_of(tmp_path / "second") != map_of(tmp_path / "other")
    assert (tmp_path / "again/snapshot.json").read_bytes() == (tmp_path / "second/snapshot.json").read_bytes()
    assert summary_of(tmp_path / "again")["encoded"] == 0


def test_revised_rows_repeat_the_sids_published_in_their_own_history(tmp_path: Path, refreshed: list[Path]) -> None:
    """The same part follows two different histories: each repeats its own SIDs."""
    store, late = tmp_path / "store", later_items(0)
    revising = pa.concat_tables([replaced(item_table().slice(0, 60), "item_id", late["item_id"]), later_items(1)])
    materialize_dataset(LOCAL, grown(tmp_path / "0", store, 0), refreshed[0], tmp_path / "first")
    one, two = grown(tmp_path / "1", store, 1), grown(tmp_path / "2", store, 2, [late, revising])
    for number in (1, 2):
        middle, out = tmp_path / f"middle-{number}", tmp_path / f"out-{number}"
        materialize_dataset(LOCAL, one, refreshed[number], middle, published=tmp_path / "first")
        materialize_dataset(LOCAL, two, refreshed[3], out, published=middle)
        dataset, listed = set_of(out)
        repeated = content(dataset, listed.table("sid", "items"))["sid"].to_pylist()[760:820]
        assert [NULL if sid is None else sid for sid in repeated] == encoded_by(refreshed[number], late)
        require_sids_of_impressions(out)
    assert encoded_by(refreshed[1], late) != encoded_by(refreshed[2], late)


def test_published_sids_are_kept_after_a_code_change(
    tmp_path: Path, refreshed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    materialize_dataset(LOCAL, grown(tmp_path / "0", store, 0), refreshed[0], tmp_path / "first")
    monkeypatch.setattr(sets, "code_digest", lambda _: "another version's")
    materialize_dataset(
        LOCAL, grown(tmp_path / "1", store, 1), refreshed[1], tmp_path / "second", published=tmp_path / "first"
    )
    assert summary_of(tmp_path / "second")["encoded"] == 60
    assert map_of(tmp_path / "second").startswith(map_of(tmp_path / "first"))
    for day in DAYS:
        assert columns_of(tmp_path / "second", day) == columns_of(tmp_path / "first", day)


def test_rewritten_date_has_the_published_sids(tmp_path: Path, refreshed: list[Path]) -> None:
    dataset = grown(tmp_path / "data", tmp_path / "store", 0)
    materialize_dataset(LOCAL, dataset, refreshed[0], tmp_path / "first")
    edit(dataset, "events", lambda rows: replaced(rows, "item_id", rows["item_id"][::-1]), f"date={DAYS[1]}")
    materialize_dataset(LOCAL, dataset, refreshed[1], tmp_path / "second", published=tmp_path / "first")
    assert summary_of(tmp_path / "second")["encoded"] == 0
    assert columns_of(tmp_path / "second", DAYS[0]) == columns_of(tmp_path / "first", DAYS[0])
    assert columns_of(tmp_path / "second", DAYS[1]) != columns_of(tmp_path / "first", DAYS[1])
    require_sids_of_impressions(tmp_path / "second")


def test_move_encodes_all_items_beside_the_published_sids_and_reports_the_share(
    tmp_path: Path, refreshed: list[Path]
) -> None:
    store = tmp_path / "store"
    materialize_dataset(LOCAL, grown(tmp_path / "0", store, 0), refreshed[0], tmp_path / "first")
    one = grown(tmp_path / "1", store, 1)
    materialize_dataset(LOCAL, one, refreshed[1], tmp_path / "moved", MOVE, published=tmp_path / "first")
    items = pa.concat_tables([item_table(), later_items(0)])
    before, after = encoded_by(refreshed[0], item_table()), encoded_by(refreshed[1], items)
    assert sids_of(tmp_path / "moved") == after
    summary = summary_of(tmp_path / "moved")
    assert summary["encoded"] == 760
    spelled = [[np.base_repr(sid, 3).zfill(6) for sid in sids] for sids in (before, after)]
    for length in range(1, 7):
        moved = np.mean([old[:length] != new[:length] for old, new in zip(*spelled, strict=False)])
        assert summary["sids"]["sid"]["moved"][str(length)] == pytest.approx(moved)
    assert 0 < summary["sids"]["sid"]["moved"]["6"] < 1
    (_, was), (_, now) = (set_of(tmp_path / name) for name in ("first", "moved"))
    assert now.generation == f"{was.generation}-{revision(refreshed[1])[:12]}"
    assert now.spec == was.spec  # same fingerprint: a ranker accepts both
    assert now.encodings == (Encoding(first=0, revision=revision(refreshed[1])),)
    spec = SidSpec.model_validate(now.spec)
    assert torch.equal(read_codebook(tmp_path / "first", spec), read_codebook(tmp_path / "moved", spec))
    for name in ("first", "moved"):
        require_sids_of_impressions(tmp_path / name)

    # Later cycles keep the moved SIDs.
    two = grown(tmp_path / "2", store, 2)
    materialize_dataset(LOCAL, two, refreshed[2], tmp_path / "kept", published=tmp_path / "moved")
    assert map_of(tmp_path / "kept").startswith(map_of(tmp_path / "moved"))
    assert set_of(tmp_path / "kept")[1].generation == now.generation
    assert summary_of(tmp_path / "kept")["encoded"] == 60


def test_item_that_loses_its_sid_counts_as_moved(tmp_path: Path, refreshed: list[Path]) -> None:
    materialize_dataset(LOCAL, grown(tmp_path / "0", tmp_path / "store", 0), refreshed[0], tmp_path / "first")
    bare = replaced(item_table(), "item_id", pa.array(np.arange(SPEC.num_items)))
    turned = pa.concat_tables([bare.slice(BARE_ITEMS[0], 1), bare.slice(1)])  # item 0 without signals
    other = write_dataset(tmp_path / "1", item_parts(replaced(turned, "item_id", bare["item_id"])))
    materialize_dataset(LOCAL, other, refreshed[0], tmp_path / "second", MOVE, published=tmp_path / "first")
    moved = summary_of(tmp_path / "second")["sids"]["sid"]["moved"]
    assert list(moved.values()) == [pytest.approx(1 / SPEC.num_items)] * 6


def test_refreshed_encoder_encodes_all_items_and_logs_it_when_no_sids_are_published(
    tmp_path: Path, refreshed: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = grown(tmp_path / "0", tmp_path / "store", 0)
    message = "no SIDs of its generation were given as published"
    materialize_dataset(LOCAL, dataset, refreshed[0], tmp_path / "first")
    assert message not in capsys.readouterr().err
    materialize_dataset(LOCAL, dataset, refreshed[1], tmp_path / "second")
    assert message in capsys.readouterr().err
    assert summary_of(tmp_path / "second")["encoded"] == 700
    assert summary_of(tmp_path / "second")["sids"]["sid"]["moved"] == {}
    assert sids_of(tmp_path / "second") == encoded_by(refreshed[1], item_table())
    assert sids_of(tmp_path / "first") == encoded_by(refreshed[0], item_table())
    assert set_of(tmp_path / "first")[1].generation != set_of(tmp_path / "second")[1].generation


def test_rebuilt_encoder_keeps_no_sids_and_both_generations_stay_readable(
    tmp_path: Path, encoder: Path, rebuilt: Path
) -> None:
    store = tmp_path / "store"
    materialize_dataset(LOCAL, grown(tmp_path / "0", store, 0), encoder, tmp_path / "old")
    old = map_of(tmp_path / "old")
    one = grown(tmp_path / "1", store, 1)
    materialize_dataset(LOCAL, one, rebuilt, tmp_path / "new", published=tmp_path / "old")
    assert summary_of(tmp_path / "new")["encoded"] == 760
    assert summary_of(tmp_path / "new")["sids"]["sid"]["moved"] == {}  # codes of two generations are not comparable
    assert sids_of(tmp_path / "new") == encoded_by(rebuilt, pa.concat_tables([item_table(), later_items(0)]))
    assert map_of(tmp_path / "old") == old
    (was, old_set), (now, new_set) = (set_of(tmp_path / name) for name in ("old", "new"))
    assert was.store == now.store
    assert old_set.generation != new_set.generation
    assert old_set.spec["fingerprint"] != new_set.spec["fingerprint"]
    for dataset in (was, now):
        dataset.verify(LOCAL, dataset.snapshot.partitions)
        require_sids_of_impressions(dataset.path)


def test_two_ranks_keep_and_move_the_same_sids_as_one(tmp_path: Path, refreshed: list[Path]) -> None:
    dataset = grown(tmp_path / "0", tmp_path / "store", 0)
    materialize_dataset(LOCAL, dataset, refreshed[0], tmp_path / "first")
    shutil.copytree(tmp_path / "store", tmp_path / "copy/store")
    shutil.copytree(tmp_path / "first", tmp_path / "copy/first")
    changes: Mapping[str, Mapping[str, str]] = {"kept": {}, "moved": MOVE}
    for name, change in changes.items():
        one = grown(tmp_path / name / "data", tmp_path / "store", 1)
        materialize_dataset(LOCAL, one, refreshed[1], tmp_path / name / "out", change, published=tmp_path / "first")
        two = grown(tmp_path / "copy" / name / "data", tmp_path / "copy/store", 1)
        out = tmp_path / "copy" / name / "out"
        run_distributed(materialize_dataset, two, refreshed[1], out, change, tmp_path / "copy/first", world_size=2)
        assert read_dataset(out).snapshot.partitions == read_dataset(tmp_path / name / "out").snapshot.partitions


def test_sids_that_cannot_be_kept_are_refused_with_all_reasons(tmp_path: Path, refreshed: list[Path]) -> None:
    materialize_dataset(LOCAL, grown(tmp_path / "0", tmp_path / "store", 0), refreshed[0], tmp_path / "first")
    turned = item_table().take(pa.array(np.arange(SPEC.num_items)[::-1]))
    other = write_dataset(
        tmp_path / "1", item_parts(replaced(turned, "item_id", item_table()["item_id"])), store=tmp_path / "elsewhere"
    )
    changes: dict[str, Any] = {"packing": "paper_eq5", "prefix_lengths": {"sid": [3]}}
    with pytest.raises(DataError, match=r"published=\S+/first: the SIDs 'sid' cannot be kept") as refused:
        materialize_dataset(LOCAL, other, refreshed[1], tmp_path / "out", changes, published=tmp_path / "first")
    for reason in (
        f"its store is {tmp_path}/store, the dataset's is {tmp_path}/elsewhere",
        "packing: 'mixed_radix' there, 'paper_eq5' here",
        f"prefix_lengths: {tuple(MATERIALIZE['prefix_lengths']['sid'])} there, (3,) here",
        "items/part=00000 has other rows there; items/part=00001 has other rows there",
        "materialize.published=move encodes all anew",
    ):
        assert reason in str(refused.value)
    materialize_dataset(LOCAL, other, refreshed[1], tmp_path / "out", {**changes, **MOVE}, published=tmp_path / "first")
    assert summary_of(tmp_path / "out")["sids"]["sid"]["moved"]["6"] > 0.9


def test_missing_published_partition_is_named_in_the_error(tmp_path: Path, refreshed: list[Path]) -> None:
    dataset = grown(tmp_path / "0", tmp_path / "store", 0)
    materialize_dataset(LOCAL, dataset, refreshed[0], tmp_path / "first")
    published, listed = set_of(tmp_path / "first")
    (entry, _) = published.partitions(listed.table("sid", "events"))
    shutil.rmtree(published.store / entry.path)
    with pytest.raises(CommitError, match=rf"{entry.path}: not a committed directory"):
        materialize_dataset(LOCAL, dataset, refreshed[1], tmp_path / "out", published=tmp_path / "first")


def test_sids_published_without_revisions_belong_to_the_encoder_of_the_spec(
    tmp_path: Path, refreshed: list[Path]
) -> None:
    store = tmp_path / "store"
    materialize_dataset(LOCAL, grown(tmp_path / "0", store, 0), refreshed[0], tmp_path / "first")
    values = json.loads((tmp_path / "first/snapshot.json").read_text())
    del values["sids"]["sid"]["encodings"]
    (tmp_path / "first/snapshot.json").write_text(json.dumps(values))
    materialize_dataset(
        LOCAL, grown(tmp_path / "1", store, 1), refreshed[1], tmp_path / "second", published=tmp_path / "first"
    )
    _, listed = set_of(tmp_path / "second")
    wanted = [revision(refreshed[0]), revision(refreshed[1])]
    assert [one.revision for one in listed.encodings] == wanted
    assert [encoder_of(listed, first) for first in (0, 699, 700)] == [wanted[0], wanted[0], wanted[1]]
