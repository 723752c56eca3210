"""The synthetic log: the contract, determinism for any number of ranks, and signals that a model can learn."""

from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.checks import check_events, check_items, check_users
from sidestack.infra.config import parse
from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import ConfigError
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.prepare import synthetic
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.synthetic import Synthetic, SyntheticLog
from tests.distributed import run_distributed
from tests.pipelines.prepare.running import digests, made_of, run_prepare

SMALL = {"kind": "synthetic", "num_items": 300, "num_users": 50, "events_per_day": 200, "train_days": 3, "test_days": 2}
CONFIG = Synthetic(kind="synthetic", num_items=2000, num_users=300, events_per_day=4000)
LOG = SyntheticLog(CONFIG)


def on_ranks(world: World, out: Path) -> None:
    run_prepare(world, {"source": SMALL}, out)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "out"
    run_prepare(ALONE, {"source": SMALL}, out)
    return out


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    spec = LOG.spec
    days = [spec.train[0], spec.train[1], spec.test[0], spec.test[1]]
    table = pa.concat_tables([chunk for day in days for chunk in LOG.impressions(day)])
    return {name: table[name].to_numpy() for name in ("event_time", "user_id", "item_id", "click", "conversion")}


@pytest.mark.parametrize("impressions", [1, 7])
def test_output_is_in_the_contract(impressions: int, tmp_path: Path) -> None:
    run_prepare(ALONE, {"source": {**SMALL, "impressions_per_request": impressions}}, tmp_path / "out")
    dataset = read_dataset(tmp_path / "out")
    kinds = {
        "items": check_items, "users": check_users, "requests": check_events, "events": check_events,
        "labels": check_events,
    }  # fmt: skip
    found = []
    for table, check in kinds.items():
        groups = row_groups([file.path for file in dataset.files(table)])
        for group in groups:
            check(read_row_group(group), dataset.spec, group)
        found.append(sum(group.rows for group in groups))
    assert found == [300, 50, 5 * -(-200 // impressions), 5 * 200, 5 * 200]
    assert len(dataset.dates(*dataset.spec.train)) == 3
    assert len(dataset.dates(*dataset.spec.test)) == 2


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_makes_the_same_bytes(ranks: int, prepared: Path, tmp_path: Path) -> None:
    run_distributed(on_ranks, tmp_path / "out", world_size=ranks)
    assert made_of(tmp_path / "out") == made_of(prepared)


def test_longer_log_makes_only_new_days_and_matured_labels(prepared: Path, tmp_path: Path) -> None:
    run_prepare(ALONE, {"source": {**SMALL, "test_days": 3}}, tmp_path / "out")
    before, after = digests(prepared), digests(tmp_path / "out")
    new = {name for name in after if before.get(name) != after[name]}
    assert new == {
        "labels/date=2024-01-04", "requests/date=2024-01-06", "events/date=2024-01-06", "labels/date=2024-01-06",
    }  # fmt: skip


def test_requests_share_user_time_and_history_and_are_drawn_by_their_first_row() -> None:
    """The first impression of a request equals that of a log of single impressions."""
    day = LOG.spec.test[0]
    grouped = SyntheticLog(CONFIG.model_copy(update={"impressions_per_request": 5}))
    several, single = (pa.concat_tables(log.impressions(day)) for log in (grouped, LOG))
    of_request = ["request_id", "user_id", "event_time", "hour_fraction", "weekday", "history_item_ids"]
    for row in range(20):
        assert several.select(of_request).slice(row, 1).equals(single.select(of_request).slice(row - row % 5, 1))
    assert several["item_id"].equals(single["item_id"])


def test_chunk_size_does_not_change_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    day = LOG.spec.test[0]
    whole = pa.concat_tables(LOG.impressions(day)).combine_chunks()
    monkeypatch.setattr(synthetic, "CHUNK_ROWS", 333)
    assert pa.concat_tables(LOG.impressions(day)).combine_chunks().equals(whole)


def test_another_seed_gives_another_log() -> None:
    day = LOG.spec.test[0]
    other = SyntheticLog(CONFIG.model_copy(update={"seed": 1}))
    first, second = (pa.concat_tables(log.impressions(day))["item_id"].to_numpy() for log in (LOG, other))
    assert (first == second).mean() < 0.1


def test_clicks_follow_affinity(rows: dict[str, np.ndarray]) -> None:
    affinity = LOG.affinity(rows["user_id"], rows["item_id"])
    assert abs(affinity.mean()) < 0.2 and 0.7 < affinity.std() < 1.3
    assert np.corrcoef(affinity, rows["click"])[0, 1] > 0.25
    low, high = np.quantile(affinity, [0.2, 0.8])
    assert rows["click"][affinity > high].mean() > 4 * rows["click"][affinity < low].mean()


def test_content_helps_on_cold_items(rows: dict[str, np.ndarray]) -> None:
    """A user's click probability on the warm item with the nearest embedding predicts clicks on the cold item."""
    cold_from = LOG._num_warm
    is_cold = rows["item_id"] >= cold_from
    in_train = rows["event_time"] < np.datetime64(LOG.spec.test[0])
    assert not (is_cold & in_train).any() and is_cold.sum() > 300
    items = pa.concat_tables(LOG.items())
    vectors_ND = np.array([vector or [0.0] * 32 for vector in items["text_embedding"].to_pylist()], np.float32)
    near = (vectors_ND[rows["item_id"][is_cold]] @ vectors_ND[:cold_from].T).argmax(axis=1)
    guessed = LOG.click_probability(rows["user_id"][is_cold], near, np.zeros(is_cold.sum(), int))
    assert np.corrcoef(guessed, rows["click"][is_cold])[0, 1] > 0.2


def test_embeddings_follow_clusters_and_some_are_null() -> None:
    items = pa.concat_tables(LOG.items())
    for name in ("text_embedding", "behaviour_embedding", "category", "brand"):
        assert 0.05 < items[name].null_count / CONFIG.num_items < 0.15
    ids_N = np.flatnonzero(items["text_embedding"].is_valid().to_numpy())[:400]
    vectors_KD = np.array(items["text_embedding"].take(pa.array(ids_N)).to_pylist(), np.float32)
    cosines_KK = vectors_KD @ vectors_KD.T
    cluster_N, fine_N = LOG.cluster(ids_N), LOG.subcluster(ids_N)
    same = np.equal.outer(cluster_N, cluster_N) & ~np.eye(len(ids_N), dtype=bool)
    same_fine = same & np.equal.outer(fine_N, fine_N)
    assert cosines_KK[same_fine].mean() > cosines_KK[same & ~same_fine].mean() + 0.1
    assert cosines_KK[same & ~same_fine].mean() > cosines_KK[~same].mean() + 0.3


def mean_cosines(items: pa.Table, name: str) -> tuple[float, float, float]:
    """Return an embedding's mean cosine within clusters, across clusters, and of items to their nearest neighbour."""
    ids_N = np.flatnonzero(items[name].is_valid().to_numpy())[:400]
    vectors_KD = np.array(items[name].take(pa.array(ids_N)).to_pylist(), np.float32)
    cosines_KK = vectors_KD @ vectors_KD.T - 2 * np.eye(len(ids_N))
    same = np.equal.outer(LOG.cluster(ids_N), LOG.cluster(ids_N)) & ~np.eye(len(ids_N), dtype=bool)
    return float(cosines_KK[same].mean()), float(cosines_KK[~same].mean()), float(cosines_KK.max(axis=1).mean())


def test_exchanged_embedding_looks_like_the_others_without_a_cluster_signal() -> None:
    changes = {"embeddings": {"told": 32, "exchanged": 32}, "exchanged": ("exchanged",)}
    log = SyntheticLog(CONFIG.model_copy(update=changes))
    items = pa.concat_tables(log.items())
    informative, exchanged = mean_cosines(items, "told"), mean_cosines(items, "exchanged")
    assert informative[0] > informative[1] + 0.3 and abs(exchanged[0] - exchanged[1]) < 0.02
    assert exchanged[2] == pytest.approx(informative[2], abs=0.05)  # neighbours are equally close
    day = LOG.spec.test[0]
    assert pa.concat_tables(log.impressions(day)).equals(pa.concat_tables(LOG.impressions(day)))


def test_histories_follow_the_taste_and_are_consistent_across_rows() -> None:
    first, second = (pa.concat_tables(LOG.impressions(day)).to_pylist() for day in (LOG.spec.test[0], LOG.spec.test[1]))
    row = next(row for row in second if len(row["history_item_ids"]) == CONFIG.max_history)
    liked = LOG.affinity(np.full(CONFIG.max_history, row["user_id"]), np.array(row["history_item_ids"]))
    assert liked.mean() > 0.3
    actions = {
        (row["user_id"], when): item
        for row in first
        for when, item in zip(row["history_times"], row["history_item_ids"], strict=True)
    }
    shared = 0
    for row in second:
        assert all(when < row["event_time"] for when in row["history_times"])
        assert row["event_time"] - row["history_times"][-1] < timedelta(days=1)
        for when, item in zip(row["history_times"], row["history_item_ids"], strict=True):
            shared += (row["user_id"], when) in actions
            assert actions.get((row["user_id"], when), item) == item
    assert shared > 100


def test_conversions_are_censored_at_the_end_of_the_log(rows: dict[str, np.ndarray]) -> None:
    end = datetime.combine(LOG.spec.test[1] + timedelta(days=1), datetime.min.time())
    followed_up = rows["event_time"] + np.timedelta64(CONFIG.followup_days, "D") < np.datetime64(end)
    assert (~np.isnan(rows["conversion"]) == followed_up).all() and 0 < followed_up.mean() < 1
    assert (rows["conversion"][followed_up & (rows["click"] == 0)] == 0).all()
    assert 0.2 < rows["conversion"][followed_up & (rows["click"] == 1)].mean() < 0.8


def test_user_embeddings_follow_tastes_and_some_are_null() -> None:
    log = SyntheticLog(CONFIG.model_copy(update={"user_embeddings": {"activity": 8, "profile": 4}}))
    users = pa.concat_tables(log.users())
    assert users.column_names == ["user_id", "activity", "profile", "segment"]
    assert users.select(["user_id", "segment"]).equals(pa.concat_tables(LOG.users()))
    assert 0.05 < users["activity"].null_count / CONFIG.num_users < 0.15
    known_K = np.flatnonzero(users["activity"].is_valid().to_numpy())
    vectors_KD = np.array(users["activity"].take(pa.array(known_K)).to_pylist(), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors_KD, axis=1), 1, atol=2e-3)
    cosines_KK = vectors_KD @ vectors_KD.T
    types_K = log.user_type(known_K)
    same = np.equal.outer(types_K, types_K) & ~np.eye(len(known_K), dtype=bool)
    assert cosines_KK[same].mean() > cosines_KK[~same].mean() + 0.4
    # A user clicks what the other user with the nearest embedding would click.
    near_K = known_K[(cosines_KK - 2 * np.eye(len(known_K))).argmax(axis=1)]
    shown = np.arange(500)
    own, guessed = (
        np.concatenate([log.click_probability(np.full(500, user), shown, np.zeros(500, int)) for user in ids_K])
        for ids_K in (known_K, near_K)
    )
    assert np.corrcoef(own, guessed)[0, 1] > 0.8


def test_user_embeddings_change_nothing_else(prepared: Path, tmp_path: Path) -> None:
    run_prepare(ALONE, {"source": {**SMALL, "user_embeddings": {"activity": 8}}}, tmp_path / "out")
    without, found = digests(prepared), digests(tmp_path / "out")
    assert {name for name in found if found[name] != without[name]} == {"users/part=00000"}
    dataset = read_dataset(tmp_path / "out")
    assert dataset.spec.user_embeddings == {"activity": 8}
    for group in row_groups([file.path for file in dataset.files("users")]):
        check_users(read_row_group(group), dataset.spec, group)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cold_share": 1.0}, "cold_share must leave items"),
        ({"embeddings": {"text": 3}}, "signal 'text' has the name of another column"),
        ({"categoricals": {"text_embedding": 3}}, "signal 'text_embedding' has the name"),
        ({"user_embeddings": {"segment": 3}}, "signal 'segment' has the name of another column of the users"),
        ({"exchanged": ["other"]}, "'other' must be one of embeddings"),
        ({"num_items": 0}, "num_items: Input should be greater than 0"),
        ({"clusters": 3}, "clusters: unknown key"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PrepareConfig, {"source": {**SMALL, **values}}, "test: prepare")


def test_unknown_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="source.*complete_journey"):
        parse(PrepareConfig, {"source": {"kind": "movielens"}}, "test: prepare")


def test_first_day_is_configurable() -> None:
    log = SyntheticLog(CONFIG.model_copy(update={"first_day": date(2031, 5, 6)}))
    assert log.spec.train[0] == date(2031, 5, 6)
    times = next(log.impressions(log.spec.train[0]))["event_time"].to_numpy()
    assert times[0].astype("datetime64[D]") == np.datetime64("2031-05-06") == times[-1].astype("datetime64[D]")
