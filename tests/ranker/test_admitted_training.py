"""Trainings with admission over several nights: rows that are kept or reassigned, and the served ranker."""

import json
import shutil
from datetime import date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sidestack.infra.commit import committing
from sidestack.infra.distributed import World
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.tables import DatasetSpec, request_schema, write_spec
from sidestack.ranker import plan
from sidestack.ranker.admission import reassigned_rows
from sidestack.ranker.bundle import open_bundle
from sidestack.ranker.config import AdmissionConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.convert import rows_of
from sidestack.ranker.features import arm_features
from sidestack.ranker.inspect import open_network, read_rows
from sidestack.ranker.row_maps import MAPS_FILE, read_row_maps, with_row_maps
from sidestack.ranker.serving.model import ServedRanker
from sidestack.ranker.sharding import ShardedRanker, build_sharded
from sidestack.ranker.warm_start import open_start
from tests.datasets import joined
from tests.distributed import run_distributed
from tests.encoder.fabricated import LOCAL
from tests.ranker.dataset import REQUEST_SPEC, SID, SPEC, write_dataset
from tests.ranker.exporting import export_inputs
from tests.ranker.test_admission import Reference
from tests.ranker.test_resume import predictions, stopping, summary, train_ranker, weights
from tests.ranker.test_score import run_score
from tests.ranker.training import config_of, whole

ADMISSION: dict[str, dict[str, int]] = {
    "item_id": {"min_count": 1, "max_age_days": 2, "max_rows": 100, "fallback_rows": 7},
    "history_item_ids": {"min_count": 4, "max_age_days": 1, "max_rows": 200, "fallback_rows": 16},
    "user_id": {"min_count": 1, "max_age_days": 1, "max_rows": 60, "fallback_rows": 2},
    "topics": {"min_count": 8, "max_age_days": 30, "max_rows": 12, "fallback_rows": 4},
}
MODEL: dict[str, Any] = {"admission": ADMISSION}
ONCE: dict[str, Any] = {"epochs": 1, "checkpoint_every": 0}
ROWS_A_DAY = 96
DAYS = [SPEC.train[0] + timedelta(days=n) for n in range(4)]


class Nights(NamedTuple):
    """Two trainings on a dataset with three impressions per request: on two dates, then warm-started with four."""

    dataset: Path
    first: Path
    second: Path


def spec_until(days: int) -> DatasetSpec:
    return REQUEST_SPEC.model_copy(update={"train": (DAYS[0], DAYS[days - 1])})


def two_nights(world: World, dataset: Path, folder: Path) -> None:
    """Train on two dates, then warm-start from that ranker with two more training dates."""
    if world.is_main:
        write_spec(dataset, spec_until(2))
    torch.distributed.barrier()
    train_ranker(world, dataset, folder / "first", "none", model=MODEL, **ONCE)
    if world.is_main:
        write_spec(dataset, spec_until(4))
    torch.distributed.barrier()
    train_ranker(world, dataset, folder / "second", "none", start=folder / "first", model=MODEL, **ONCE)


def trained(folder: Path, ranks: int) -> Nights:
    dataset = write_dataset(folder / "dataset", rows_a_day=ROWS_A_DAY, impressions=3)
    run_distributed(two_nights, dataset, folder, world_size=ranks)
    return Nights(dataset, folder / "first", folder / "second")


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    return trained(tmp_path_factory.mktemp("nights"), 1)


def seen_on(dataset: Path, column: str, day: date) -> list[int]:
    """Return the ids of a date by reading all its joined rows; columns of requests count once per request."""
    found: list[int] = []
    last: object = None
    of_requests = request_schema(REQUEST_SPEC).names
    for row in joined(dataset, None, day, day).to_pylist():
        if column in of_requests and row["request_id"] == last:
            continue
        last = row["request_id"]
        found += row[column] if isinstance(row[column], list) else [row[column]]
    return found


@pytest.mark.parametrize("column", ADMISSION)
def test_row_maps_match_a_slow_count_in_which_each_date_counts_once(nights: Nights, column: str) -> None:
    reference = Reference(AdmissionConfig.model_validate(ADMISSION[column]))
    for out, days in ((nights.first, DAYS[:2]), (nights.second, DAYS[2:])):
        # A training counts all its dates before it assigns rows.
        for day in days[:-1]:
            for id in seen_on(nights.dataset, column, day):
                reference.count[id] = reference.count.get(id, 0) + 1
                reference.last_seen[id] = day
        before = set(reference.row)
        reference.night(days[-1], seen_on(nights.dataset, column, days[-1]))
        row_I = read_row_maps(out / "model", [column])[column]
        assert row_I.tolist() == reference.rows(len(row_I))
        turnover = summary(out)["admission"][column]
        assert turnover["own_rows"] == len(reference.row)
        assert (turnover["admitted"], turnover["evicted"]) == (
            len(reference.row.keys() - before),
            len(before - {*reference.row}),
        )
    assert column == "topics" or turnover["evicted"] > 0


def started(world: World, nights: Nights) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a model as it is initialized, and as the second night warm-starts it from the first."""

    def built() -> ShardedRanker:
        return build_sharded(features, config, world, ModelConstants())

    config = config_of("none", model=MODEL)
    features = arm_features(spec_until(4), config, {"sid": SID})
    start = open_start(nights.first, config, spec_until(4), features)
    features = with_row_maps(start.features(features), nights.second / "model")
    fresh, sharded = built(), built()
    start.load(sharded, features)
    return whole(world, fresh.state()), whole(world, sharded.state())


@pytest.mark.parametrize("ranks", [1, 2])
def test_kept_rows_are_bit_identical_and_reassigned_rows_are_initialized(nights: Nights, ranks: int) -> None:
    fresh, found = run_distributed(started, nights, world_size=ranks)[0]
    old = weights(nights.first)
    for column, settings in ADMISSION.items():
        before, after = (read_row_maps(out / "model", [column])[column] for out in (nights.first, nights.second))
        given = reassigned_rows(before, after, settings["max_rows"], settings["fallback_rows"])
        kept = np.setdiff1d(np.arange(settings["max_rows"]), given)
        assert len(given) > 0 or column == "topics"
        names = [name for name in found if f".t_{column}." in name]
        assert {name.split(".")[-1] for name in names} == {"weight", "momentum1"}
        for name in names:
            assert torch.equal(found[name][kept], old[name][kept]), name
            assert torch.equal(found[name][given], fresh[name][given]), name
        assert column == "topics" or not torch.equal(found[names[0]][given], old[names[0]][given])


def changed_rows(world: World, **sections: Any) -> dict[str, list[int]]:
    """Add 1 to two rows of the users' table through `held_rows`; return the rows that changed in each tensor."""
    config = config_of("none", **sections)
    features = arm_features(SPEC, config, {})
    sharded = build_sharded(features, config, world, ModelConstants())
    before = whole(world, sharded.state())
    for part, places, values in sharded.held_rows(features, {"t_user_id": torch.tensor([3, 59])}):
        part[places] = values + 1
    after = whole(world, sharded.state())
    return {
        name.split(".")[-1]: torch.unique((after[name] != value).nonzero()[:, 0]).tolist()
        for name, value in before.items()
        if not torch.equal(after[name], value)
    }


@pytest.mark.parametrize("types", [["table_wise"], ["column_wise"]])
def test_rows_of_a_table_and_their_states_are_found_under_any_plan(types: list[str]) -> None:
    sections: dict[str, Any] = {"model": {"embedding_dim": 256}, "sharding": {"types": types}}
    found = run_distributed(partial(changed_rows, **sections), world_size=2)[0]
    halves = [3, 59, 63, 119] if types == ["column_wise"] else [3, 59]
    assert found == {"weight": [3, 59], "momentum1": halves}


def test_two_ranks_give_the_same_rows_and_the_same_ranker(nights: Nights, tmp_path: Path) -> None:
    two = trained(tmp_path, 2)
    for ours, theirs in ((two.first, nights.first), (two.second, nights.second)):
        maps, expected = (load_file(out / "model" / MAPS_FILE) for out in (ours, theirs))
        assert maps.keys() == expected.keys()
        assert all(torch.equal(maps[name], value) for name, value in expected.items())
        for name in ("p_click", "p_conversion"):
            np.testing.assert_allclose(predictions(ours)[name], predictions(theirs)[name], atol=1e-5)


def test_resumed_training_gives_the_same_ranker(nights: Nights, world: World, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"start": nights.first, "model": MODEL, "batch_size": 8}
    with stopping():
        train_ranker(world, nights.dataset, tmp_path / "resumed", "none", **changes)
    assert not (tmp_path / "resumed").exists()
    for name in ("resumed", "whole"):
        train_ranker(world, nights.dataset, tmp_path / name, "none", **changes)
    ours, theirs = (weights(tmp_path / name) for name in ("resumed", "whole"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_scores_and_inspection_match_the_training(nights: Nights, world: World, tmp_path: Path) -> None:
    run_score(world, nights.second, nights.dataset, tmp_path / "scored")
    expected, scored = predictions(nights.second), predictions(tmp_path / "scored")
    bundle, dataset = open_bundle(nights.second), read_dataset(nights.dataset)
    p_NT = open_network(bundle, dataset).probabilities(read_rows(dataset, bundle, 10**6))
    for place, task in enumerate(SPEC.tasks):
        wanted = expected[f"p_{task}"]
        np.testing.assert_allclose(scored[f"p_{task}"].to_numpy()[-len(wanted) :], wanted, atol=1e-6)
        np.testing.assert_allclose(p_NT[:, place], wanted, atol=1e-6)


def test_new_ids_of_a_grown_dataset_use_the_fallback_rows(nights: Nights) -> None:
    larger = spec_until(4).model_copy(update={"num_items": 1000})
    features = open_bundle(nights.second).features(larger)
    (item,) = (one for one in features.bags if one.column == "item_id")
    row_I = read_row_maps(nights.second / "model", ["item_id"])["item_id"]
    ids = np.array([299, 300, 999, 5])
    assert rows_of(ids, item).tolist() == [row_I[299], 300 % 7, 999 % 7, row_I[5]]
    assert rows_of(ids[:0], item).tolist() == []
    assert item.rows == 100


@pytest.mark.parametrize("tables", ["float32", "float16"])
def test_served_version_matches_the_ranker_and_unknown_ids_share_a_fallback_row(
    nights: Nights, tmp_path: Path, tables: str
) -> None:
    with committing(tmp_path / "dataset", LOCAL, stage="materialize") as staging:
        shutil.copytree(nights.dataset, staging, dirs_exist_ok=True)
    inputs = {"model": nights.second, "dataset": tmp_path / "dataset"}
    version = export_inputs(inputs, tmp_path / "out", tables=tables, max_ne_loss=0.01)
    if tables == "float32":  # of 150 held-out rows; a larger one is not committed
        assert summary(tmp_path / "out")["largest_difference"] <= 1e-5
    assert load_file(version / MAPS_FILE).keys() == {f"{column}/rows" for column in ADMISSION}
    served = ServedRanker(version)
    row_I = served.features.bags[1].row_map
    assert served.features.bags[1].column == "item_id" and row_I is not None
    like = int(np.flatnonzero(row_I == SPEC.num_items % 7)[0])
    unlike = int(np.flatnonzero(row_I == (SPEC.num_items + 1) % 7)[0])
    others = {"rank": 1.0, "price": 1.0, "slot": [1], "topics": [2]}
    spec = served.config.ranker.spec
    columns = {name: value for name, value in others.items() if name in (*spec.dense, *spec.sparse)}
    user = {name: value for name, value in others.items() if name not in columns}
    ids: list[dict[str, int]] = [{"item_id": 10**9}, {}, {"item_id": like}, {"item_id": unlike}]
    request = {
        "user": {"user_id": 1, **user},
        "time": datetime(2024, 1, 5).isoformat(),
        "candidates": [{**id, **columns} for id in ids],
    }
    answer = served.answer(request, "request")
    assert answer["unknown"] == {"items": 2}
    unknown, missing, alike, apart = answer["probabilities"]["click"]
    assert unknown == missing == pytest.approx(alike, abs=1e-7)
    assert apart != unknown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topics": None}, "topics: the earlier ranker has admission, this one has none"),
        (
            {"slot": {"min_count": 1, "max_age_days": 1, "max_rows": 9, "fallback_rows": 2}},
            "slot: the earlier ranker has",
        ),
        (
            {"user_id": {**ADMISSION["user_id"], "fallback_rows": 3, "max_rows": 50}},
            "user_id.fallback_rows=3: must be 2, .*; user_id.max_rows=50: must be 60 at least",
        ),
    ],
)
def test_settings_that_would_move_rows_are_refused(nights: Nights, changes: dict[str, Any], message: str) -> None:
    admission = {column: one for column, one in {**ADMISSION, **changes}.items() if one is not None}
    config = config_of("none", model={"admission": admission})
    features = arm_features(spec_until(4), config, {"sid": SID})
    with pytest.raises(ConfigError, match=message):
        open_start(nights.first, config, spec_until(4), features)


def test_plan_has_the_tables_that_the_training_built(nights: Nights, tmp_path: Path) -> None:
    section = config_of("none", model=MODEL).model_dump(mode="json", exclude={"training"})
    (tmp_path / "run.yaml").write_text(json.dumps({"ranker": section}))
    words = ["--config", str(tmp_path / "run.yaml"), "--dataset", str(nights.dataset), "--ranks", "1"]
    plan.main([*words, "--device", "cpu", "--memory-gib", "8", "--json", str(tmp_path / "plan.json")])
    tables = json.loads((tmp_path / "plan.json").read_text())["tables"]
    assert {name: one["rows"] for name, one in tables.items()} == open_bundle(nights.second).description.rows
    assert tables["t_item_id"]["rows"] == ADMISSION["item_id"]["max_rows"]


def test_summary_has_the_share_of_ids_that_share_a_row(nights: Nights) -> None:
    tables = {one["table"]: one for one in summary(nights.second)["tables"]}
    row_I = read_row_maps(nights.second / "model", ["item_id"])["item_id"]
    seen = {id for day in DAYS for id in seen_on(nights.dataset, "item_id", day)}
    rows = [int(row_I[id]) for id in seen]
    assert tables["t_item_id"]["collision_share"] == pytest.approx(np.mean([rows.count(row) > 1 for row in rows]))
    assert tables["t_item_id"]["bytes"] == 100 * 8 * 4


def test_warm_start_accepts_more_rows_and_other_counts_and_ages(nights: Nights, world: World, tmp_path: Path) -> None:
    changed = {"item_id": {**ADMISSION["item_id"], "max_rows": 320, "max_age_days": 9}}
    changed["user_id"] = {**ADMISSION["user_id"], "min_count": 2}
    model = {"admission": {**ADMISSION, **changed}}
    train_ranker(world, nights.dataset, tmp_path / "third", "none", start=nights.second, model=model, **ONCE)
    before, after = (
        read_row_maps(out / "model", ["item_id"])["item_id"] for out in (nights.second, tmp_path / "third")
    )
    own = before >= 7
    assert np.array_equal(before[own], after[own])
    assert after.max() >= 100
    assert open_bundle(tmp_path / "third").description.rows["t_item_id"] == 320


def test_a_dataset_with_fewer_ids_is_refused(nights: Nights, world: World, tmp_path: Path) -> None:
    write_spec(nights.dataset, spec_until(4).model_copy(update={"num_users": 59}))
    try:
        with pytest.raises(
            DataError, match="column 'user_id' has 59 ids, the ranker that the training starts from knows 60"
        ):
            train_ranker(world, nights.dataset, tmp_path / "out", "none", start=nights.first, model=MODEL, **ONCE)
    finally:
        write_spec(nights.dataset, spec_until(4))


def test_admission_of_a_column_without_ids_is_refused() -> None:
    config = config_of("none", model={"admission": {"price": ADMISSION["user_id"]}})
    with pytest.raises(
        ConfigError, match=r"ranker\.model\.admission: 'price' is no id column; the dataset has user_id"
    ):
        arm_features(SPEC, config, {})
