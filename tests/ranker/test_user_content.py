"""Content at the user's position: SIDs and embeddings of users, beside those of items."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sidestack.infra.config import parse
from sidestack.infra.distributed import World
from sidestack.infra.errors import DataError, SpecError
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.budget import DecidedConfig
from sidestack.ranker.constants import read_constants
from sidestack.ranker.cost import embedding_bytes
from sidestack.ranker.features import ArmFeatures, arm_features, dataset_sids
from sidestack.ranker.reader import to_ranker_batch
from sidestack.ranker.sharding import build_sharded
from tests.ranker.dataset import HABIT, SID, SIDS, SPEC, USER_SPEC, write_dataset_with_users
from tests.ranker.joined_rows import batch_of, first_rows
from tests.ranker.training import SMALL, config_with, run_steps

EVERY = {**SIDS, "habit": HABIT}
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "dense": {"user": "dense"},
    "sid_ngram": {"user": "sid_ngram", "sids": ["habit"]},
    "hde": {"user": "hde", "sids": ["habit"]},
    "side": {"user": "side", "sids": ["habit"]},
    "side_both": {"item": "side", "user": "side", "sids": ["sid", "habit"]},
    "dense_both": {"item": "dense", "history": "dense", "user": "dense"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset_with_users(tmp_path_factory.mktemp("users") / "dataset")


def laid_out(**arm: Any) -> ArmFeatures:
    return arm_features(USER_SPEC, config_with(arm), EVERY)


def config_of(arm: str) -> DecidedConfig:
    return parse(DecidedConfig, {"arms": ARMS, "arm": arm, **SMALL}, "test").resolved()


def test_sid_sets_of_a_dataset_include_those_of_users(dataset: Path) -> None:
    assert dataset_sids(read_dataset(dataset)) == EVERY


def test_each_position_uses_the_sid_sets_of_its_entity(dataset: Path) -> None:
    features = laid_out(**ARMS["side_both"])
    assert [content.sids for content in features.contents] == [(SID,), (), (HABIT,)]
    assert set(features.sid_columns) == {"item_sid", "user_habit"}
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), features)
    habits = table["user_habit"].to_pylist()
    assert None in habits
    assert batch.user_content_RC[:, 0].tolist() == [habit or 0 for habit in habits]
    assert batch.user_known_RS[:, 0].tolist() == [habit is not None for habit in habits]
    assert batch.item_content_BC[:, 0].tolist() == [sid or 0 for sid in table["item_sid"].to_pylist()]


def test_prefixes_of_users_are_bags(dataset: Path) -> None:
    table, features = first_rows(dataset), laid_out(**ARMS["hde"])
    names = [table.column for table in features.user.tables]
    assert names == ["user_habit_prefix_2"] and not features.item.tables
    bags = to_ranker_batch(batch_of(table), features).request_bags["user_habit_prefix_2"].to_dense()
    wanted = [[] if sid is None else [sid] for sid in table["user_habit_prefix_2"].to_pylist()]
    assert [ids.tolist() for ids in bags] == wanted


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_a_user_without_content_gets_zeros(world: World, dataset: Path, arm: str) -> None:
    config = config_of(arm)
    outcome = run_steps(world, dataset, config, 6)
    assert torch.tensor(outcome.losses).isfinite().all()
    features = arm_features(USER_SPEC, config, EVERY)
    body = build_sharded(
        features, config, world, read_constants(read_dataset(dataset), features.constants)
    ).model.module.body
    if features.user.is_none:
        assert body.user_content is None
        return
    batch = to_ranker_batch(batch_of(first_rows(dataset)), features)
    bags = {name: torch.ones(len(batch.labels_BT), 8) for name in body.user_content.names}
    bags = {name: ones * (batch.request_bags[name].lengths() > 0)[:, None] for name, ones in bags.items()}
    content_RD = body.user_content(batch.user_content_RC, batch.user_known_RS, bags)
    is_known_R = torch.tensor([user % 5 > 0 for user in batch.request_bags["user_id"].values().tolist()])
    assert (content_RD[~is_known_R] == 0).all() and (content_RD[is_known_R] != 0).any(1).all()


def test_every_arm_has_a_user_position_when_the_dataset_has_user_content(world: World, dataset: Path) -> None:
    shapes = {arm: run_steps(world, dataset, config_of(arm), 1).start for arm in ("none", "side")}
    own = [name for name in shapes["side"] if "user_content" in name]
    assert own and {name for name in shapes["side"] if name not in own} == set(shapes["none"])
    for name, value in shapes["none"].items():
        assert torch.equal(value, shapes["side"][name]), name
    assert not arm_features(SPEC, config_of("none"), SIDS).has_user_place
    assert arm_features(SPEC, config_of("none"), EVERY).has_user_place
    assert arm_features(USER_SPEC, config_of("none"), SIDS).has_user_place


def test_embedding_of_a_user_costs_its_bytes_once_per_request(dataset: Path) -> None:
    opened, dates = read_dataset(dataset), USER_SPEC.train
    assert embedding_bytes(laid_out(user="dense"), opened, dates) == 2 * 4
    both = embedding_bytes(laid_out(item="dense", user="dense"), opened, dates)
    assert both == 2 * (4 + 6 + 4)


@pytest.mark.parametrize(
    ("arm", "error", "message"),
    [
        ({"user": "side"}, SpecError, r"'side': sids=\['sid'\] are none of users, which user asks for"),
        ({"item": "side", "sids": ["habit"]}, SpecError, r"sids=\['habit'\] are none of items, which item asks for"),
        ({"user": "hde", "sids": ["habit", "sid"]}, SpecError, "'sid' is used at no position"),
        ({"user": "dense", "embeddings": ["words"]}, DataError, r"the users have no embedding of \['words'\]"),
    ],
)
def test_content_that_does_not_fit_the_position_is_refused(
    arm: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        laid_out(**arm)
