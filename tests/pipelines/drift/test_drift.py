"""Stage `drift`: the figures of two cycles against slow references, no change, the first cycle, and wrong inputs."""

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.signals import signal_batch
from sidestack.infra.config import parse
from sidestack.infra.manifest import verify
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.stage import run_stage
from sidestack.pipelines.drift.config import DriftConfig
from sidestack.pipelines.drift.measure import NO_LABELS
from sidestack.pipelines.drift.result import DRIFT_FILE, Drift, figures
from sidestack.pipelines.drift.stage import INPUTS, OPTIONAL, TABLE_FILE, drift
from tests.datasets import content, joined
from tests.encoder.fabricated import (
    LOCAL,
    events,
    item_table,
    materialize_dataset,
    replaced,
    train_encoder,
    write_dataset,
)

FIRST, SECOND, THIRD = (date(2024, 1, day) for day in (1, 2, 3))
BEFORE_ITEMS = 400
QUICK = {"training": {"epochs": 1}}


class Made:
    """Two cycles: the second has another day, 300 more items and another item encoder; the user encoder is the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        items = item_table()
        parts = [items.slice(0, BEFORE_ITEMS), items.slice(BEFORE_ITEMS)]
        days = {FIRST: old_events(FIRST, 120), SECOND: old_events(SECOND, 100), THIRD: immature(events(THIRD, 150))}
        plain_before = write_dataset(folder / "plain-before", parts[:1], {day: days[day] for day in (FIRST, SECOND)})
        plain_now = write_dataset(folder / "plain-now", parts, days)
        old = self.encoder("old", plain_before, {})
        self.now_encoder = self.encoder("new", plain_now, {"training": {"epochs": 1, "seed": 1}})
        self.user_encoder = self.encoder(
            "users", plain_before, {"entity": "user", "training": {"epochs": 1, "batch_size": 8}}
        )
        self.before = self.materialized("before", plain_before, {"sid": old, "taste": self.user_encoder})
        self.now = self.materialized("now", plain_now, {"sid": self.now_encoder, "taste": self.user_encoder})
        self.inputs = {
            "now": self.now,
            "before": self.before,
            "encoder.sid": self.now_encoder,
            "encoder.taste": self.user_encoder,
        }

    def encoder(self, name: str, dataset: Path, changes: Mapping[str, Any]) -> Path:
        train_encoder(LOCAL, dataset, self.folder / name, {**QUICK, **changes})
        return self.folder / name

    def materialized(self, name: str, dataset: Path, encoders: Mapping[str, Path]) -> Path:
        materialize_dataset(LOCAL, dataset, encoders, self.folder / name)
        return self.folder / name


def old_events(day: date, rows: int) -> pa.Table:
    """Return impressions of the items of the first cycle."""
    table = events(day, rows)
    histories = [[item % BEFORE_ITEMS for item in history] for history in table["history_item_ids"].to_pylist()]
    table = replaced(table, "history_item_ids", pa.array(histories, pa.list_(pa.int64())))
    return replaced(table, "item_id", pa.array(table["item_id"].to_numpy() % BEFORE_ITEMS))


def immature(table: pa.Table) -> pa.Table:
    """Return impressions with a third of their click labels and without conversion labels."""
    clicks = [click if i % 3 == 0 else None for i, click in enumerate(table["click"].to_pylist())]
    unknown = pa.nulls(table.num_rows, pa.int8())
    return replaced(replaced(table, "click", pa.array(clicks, pa.int8())), "conversion", unknown)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("cycles"))


def run(out: Path, inputs: Mapping[str, Path], *settings: str) -> Drift:
    """Run the stage as its main program, and read what it committed."""
    named = [word for name, path in inputs.items() for word in ("--input", f"{name}={path}")]
    chosen = [word for setting in settings for word in ("--set", setting)]
    run_stage("drift", "drift", DriftConfig, INPUTS, drift, [*named, *chosen, "--out", str(out)], optional=OPTIONAL)
    assert {DRIFT_FILE, TABLE_FILE, "summary.json"} <= verify(out).files.keys()
    return parse(Drift, json.loads((out / DRIFT_FILE).read_text()), DRIFT_FILE)


@pytest.fixture(scope="module")
def grown(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grown") / "drift"
    run(out, made.inputs)
    return out


def drift_of(path: Path) -> Drift:
    return parse(Drift, json.loads((path / DRIFT_FILE).read_text()), DRIFT_FILE)


def test_volume_label_rates_and_newcomers_match_the_rows(made: Made, grown: Path) -> None:
    """The third day is new; its users are all known, some of its items are not."""
    found = drift_of(grown)
    assert (found.new_dates, found.earlier_dates) == ((THIRD,), (FIRST, SECOND))
    assert found.impressions_a_day.earlier == 110 and found.impressions_a_day.change == pytest.approx(150 / 110 - 1)
    new, earlier = (joined(made.now, ["item_id", "click"], *days) for days in ((THIRD, THIRD), (FIRST, SECOND)))
    rates = [np.mean([c for c in table["click"].to_pylist() if c is not None]) for table in (new, earlier)]
    assert found.label_rates["click"].new == pytest.approx(rates[0])
    assert found.label_rates["click"].change == pytest.approx(rates[0] / rates[1] - 1)
    assert found.label_rates["conversion"].new is None and "label_rates.conversion" in found.missing
    is_new = [item >= BEFORE_ITEMS for item in new["item_id"].to_pylist()]
    assert found.new_items is not None and found.new_items.of_impressions == np.mean(is_new) > 0
    assert found.new_items.of_table == pytest.approx(300 / 700)
    assert found.new_users is not None and (found.new_users.of_impressions, found.new_users.of_table) == (0, 0)
    assert found.psi.keys() == {"price", "slot"} and all(
        value is not None and value > 0 for value in found.psi.values()
    )


def digits_of(dataset: Dataset, name: str) -> list[list[int] | None]:
    """Return the SIDs of the items or users as ternary digits."""
    table = "items" if name == "sid" else "users"
    column = content(dataset, dataset.snapshot.sids[name].table(name, table))[name].to_pylist()
    return [None if sid is None else [sid // 3**place % 3 for place in (5, 4, 3, 2, 1, 0)] for sid in column]


def test_sids_of_a_new_encoder_changed_and_sids_of_the_same_encoder_did_not(made: Made, grown: Path) -> None:
    found = drift_of(grown)
    now, before = (digits_of(read_dataset(path), "sid") for path in (made.now, made.before))
    pairs = [(a, b) for a, b in zip(now, before, strict=False) if a is not None and b is not None]
    sid, taste = found.sids["sid"], found.sids["taste"]
    assert sid.same_encoder is False and sid.change is not None and sid.change.compared == len(pairs)
    for length in (2, 4, 6):
        assert sid.change.changed_share[length] == np.mean([a[:length] != b[:length] for a, b in pairs]) > 0
    assert sid.change.null_both == sum(row is None for row in before)
    assert sid.now.rows == sum(row is not None for row in now) and sid.before is not None
    assert sid.before.rows == sum(row is not None for row in before)
    assert taste.same_encoder is True and taste.change is not None and taste.entity == "user"
    assert taste.change.hamming == 0 and set(taste.change.changed_share.values()) == {0}
    assert taste.before == taste.now


def test_reconstruction_of_new_and_old_items_is_the_mean_loss_of_their_rows(made: Made, grown: Path) -> None:
    bundle = load_bundle(made.now_encoder, torch.device("cpu"))
    items = item_table()
    losses = drift_of(grown).sids["sid"].reconstruction
    assert losses is not None and losses.keys() == set(bundle.signals.names)
    for of, rows in (("new", items.slice(BEFORE_ITEMS)), ("old", items.slice(0, BEFORE_ITEMS))):
        batch = signal_batch(rows, bundle.signals)
        with torch.no_grad():
            losses_KB = bundle.model.row_losses(batch, bundle.model.reconstruct(bundle.model.digits(batch)))
        for name, losses_B in zip(bundle.signals.names, losses_KB, strict=True):
            mean = float(losses_B.sum() / batch.present[name].sum())
            assert getattr(losses[name], of) == pytest.approx(mean, rel=1e-4)
    assert losses["brand"].ratio == losses["brand"].new / losses["brand"].old  # type: ignore[operator]
    of_users = drift_of(grown).sids["taste"].reconstruction
    assert of_users is not None and all(one.new is None and one.old is not None for one in of_users.values())


def test_figures_have_names_and_leave_out_nulls(grown: Path) -> None:
    values = json.loads((grown / DRIFT_FILE).read_text())
    found = figures(values)
    named = {
        "sid_changed_share.sid.2", "sid_hamming.sid", "collision_share.sid", "collision_share_before.sid",
        "codes_in_use.sid.1", "code_entropy_share_before.taste.3", "reconstruction_ratio.sid.text_embedding",
        "new_item_share", "new_user_share_of_users", "volume_change", "label_rate_change.click", "psi.price",
        "psi.slot",
    }  # fmt: skip
    assert named <= found.keys()
    assert found["psi.price"] == values["psi"]["price"]
    assert found["reconstruction_old.taste.age"] == values["sids"]["taste"]["reconstruction"]["age"]["old"]
    assert not [name for name in found if name.startswith(("label_rate.conversion", "reconstruction_new.taste"))]
    assert json.loads((grown / "summary.json").read_text()) == found


def test_table_is_aligned_and_names_what_was_not_measured(grown: Path) -> None:
    first, header, *lines = (grown / TABLE_FILE).read_text().splitlines()
    assert first == "drift: 1 new dates, 2024-01-03 to 2024-01-03, against 2 earlier ones, 2024-01-01 to 2024-01-02"
    (volume,) = (line for line in lines if line.startswith("impressions a day"))
    assert volume.split()[-3:] == ["110", "150", "+36.4%"]
    assert [volume.index(cell) + len(cell) for cell in ("110", "150", "+36.4%")] == [
        header.index(word) + len(word) for word in ("earlier", "now", "change")
    ]
    assert lines[-1] == f"not measured, as {NO_LABELS}: label_rates.conversion"


def test_sample_depends_only_on_the_seed(made: Made, tmp_path: Path) -> None:
    small = "drift.sample_items=50"
    found = [
        run(tmp_path / f"{place}", made.inputs, small, f"drift.seed={seed}").sids["sid"].reconstruction
        for place, seed in enumerate((1, 1, 2))
    ]
    assert found[0] == found[1] != found[2]


def test_unchanged_snapshot_has_zero_drift(tmp_path: Path, made: Made) -> None:
    """Both inputs are the same snapshot, whose two days have the same rows."""
    plain = write_dataset(tmp_path / "plain", days=dict.fromkeys((FIRST, SECOND), events(FIRST, 80)))
    materialize_dataset(LOCAL, plain, made.now_encoder, tmp_path / "same")
    inputs = {"now": tmp_path / "same", "before": tmp_path / "same", "encoder.sid": made.now_encoder}
    found = figures(run(tmp_path / "drift", inputs).model_dump(mode="json"))
    zero = ("sid_changed_share", "sid_hamming", "psi", "volume_change", "label_rate_change", "new_")
    measured = {name: value for name, value in found.items() if name.startswith(zero)}
    assert len(measured) >= 11 and set(measured.values()) == {0}
    for name in found:
        if "_before." in name:
            assert found[name] == found[name.replace("_before.", ".")]
    assert not [name for name in found if name.startswith(("reconstruction_ratio", "reconstruction_new"))]


def test_figures_that_need_an_earlier_snapshot_are_null_in_the_first_cycle(made: Made, tmp_path: Path) -> None:
    inputs = {name: path for name, path in made.inputs.items() if name != "before"}
    found = run(tmp_path / "drift", inputs)
    assert found.new_dates == (THIRD,) and found.new_items is None and found.new_users is None
    assert found.missing.keys() == {"new_items", "new_users", "label_rates.conversion"}
    sid = found.sids["sid"]
    assert (sid.same_encoder, sid.change, sid.before, sid.reconstruction) == (None, None, None, None)
    assert sid.missing.keys() == {"change", "before", "reconstruction"} and sid.now.rows > 0
    names = {name.partition(".")[0] for name in figures(found.model_dump(mode="json"))}
    assert names == {
        "collision_share", "codes_in_use", "code_entropy_share", "impressions_a_day", "volume_change", "label_rate",
        "label_rate_change", "psi",
    }  # fmt: skip


def test_figures_that_need_earlier_dates_are_null_without_them(made: Made, tmp_path: Path) -> None:
    found = run(tmp_path / "drift", made.inputs, "drift.new_dates=[2024-01-01, 2024-01-02]")
    assert found.new_dates == (FIRST, SECOND) and found.earlier_dates == ()
    assert found.impressions_a_day.new == 110 and found.impressions_a_day.change is None
    assert found.psi == {"price": None, "slot": None}
    assert {"impressions_a_day", "label_rates", "psi"} <= found.missing.keys()


def test_sids_with_other_digits_or_of_another_name_are_not_compared(made: Made, tmp_path: Path) -> None:
    other = {"quantizer": {"kind": "structured", "groups": 2, "depth": 2, "group_dim": 4}}
    shorter = made.encoder("shorter", made.folder / "plain-before", other)
    changes = {"prefix_lengths": {"sid": [2]}}
    materialize_dataset(LOCAL, made.folder / "plain-before", shorter, tmp_path / "before", changes)
    inputs = {name: path for name, path in made.inputs.items() if name != "encoder.taste"}
    found = run(tmp_path / "drift", {**inputs, "before": tmp_path / "before"}).sids
    assert found["sid"].change is None and "depth 2 x groups 2" in found["sid"].missing["change"]
    assert found["sid"].before is not None and len(found["sid"].before.layers) == 2
    assert found["taste"].missing["change"] == "the snapshot before has no SIDs 'taste'"
    assert found["taste"].missing["reconstruction"] == "there is no input encoder.taste"
    text = (tmp_path / "drift" / TABLE_FILE).read_text()
    assert "\nsid: codes in use, worst layer " in text
    assert (
        "\nnot measured, as SIDs are of items, depth 3 x groups 2, 1 x 3 values a digit; before of items, depth 2"
        in text
    )
    assert "\nnot measured, as there is no input encoder.taste: taste.reconstruction\n" in text


def test_altered_partition_is_refused(made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Alter one partition of each kind that is read: events, requests, items, SIDs now and before."""
    kinds = ("now", "events"), ("now", "requests"), ("now", "items"), ("now", "sids/sid"), ("before", "sids/sid")
    for place, (name, table) in enumerate(kinds):
        dataset = read_dataset(made.inputs[name])
        (entry, *_) = [one for one in dataset.snapshot.partitions if re.match(f"{table}(/.*/items)?$", one.table)]
        file = dataset.store / entry.path / entry.files[0].name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(SystemExit):
            run(tmp_path / str(place), made.inputs)
        assert str(file.parent) in capfd.readouterr().err
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({"encoder.sid": "old"}, (), "encoder.sid: has the fingerprint"),
        ({"encoder.other": "new"}, (), "encoder.other: .* has no SIDs of this name; it has sid, taste"),
        ({"now": "before", "before": "now"}, (), "before: has 400 items, .*now has 700: `now` must be the later"),
        (
            {},
            ("drift.new_dates=[2024-02-01, 2024-02-02]",),
            "drift.new_dates: .* its dates are 2024-01-01 to 2024-01-03",
        ),
        ({}, ("drift.new_dates=[2024-01-02, 2024-01-01]",), "2024-01-02 must not be after 2024-01-01"),
    ],
)
def test_wrong_inputs_are_named(
    made: Made,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    changed: Mapping[str, str],
    settings: tuple[str, ...],
    message: str,
) -> None:
    inputs = {**made.inputs, **{name: made.folder / path for name, path in changed.items()}}
    with pytest.raises(SystemExit):
        run(tmp_path / "drift", inputs, *settings)
    assert re.search(message, capfd.readouterr().err)
    assert not (tmp_path / "drift").exists()
