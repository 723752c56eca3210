"""Warm start from an earlier ranker: what is loaded, what restarts, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.commit import committing
from sidestack.infra.distributed import World
from sidestack.infra.errors import ConfigError, DataError, SidestackError, SpecError
from sidestack.infra.tables import DatasetSpec, TaskSpec
from sidestack.ranker.budget import DecidedConfig
from sidestack.ranker.bundle import open_bundle
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.features import ArmFeatures, arm_features
from sidestack.ranker.fit import start_model
from sidestack.ranker.planner import Traffic
from sidestack.ranker.sharding import ShardedRanker, build_sharded, table_of
from sidestack.ranker.warm_start import open_start
from tests.distributed import run_distributed
from tests.ranker.dataset import SID, SPEC, write_dataset
from tests.ranker.test_growth import LARGER
from tests.ranker.test_resume import predictions, summary, train_ranker, weights
from tests.ranker.training import config_of, whole

OTHER = SID.model_copy(update={"fingerprint": "ba" * 32})
"""The same SIDs, but of another encoder."""
ONCE: dict[str, Any] = {"epochs": 1, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("warm") / "dataset", rows_a_day=128)


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return finished trainings by arm, made by two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    arms = ("side", "sid_ngram", "hde")
    for arm in arms:
        run_distributed(train_ranker, dataset, folder / arm, arm, world_size=2)
    return {arm: folder / arm for arm in arms}


def started(
    world: World, path: Path, config: DecidedConfig, spec: DatasetSpec = SPEC, sid: SidSpec = SID
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return all weights and states of a model as initialized, and as warm-started from an earlier ranker."""

    def built() -> tuple[ShardedRanker, ArmFeatures]:
        return build_sharded(features, config, world, ModelConstants()), features

    features = arm_features(spec, config, {"sid": sid})
    start = open_start(path, config, spec, features)
    features = start.features(features)
    fresh, _ = built()
    fresh.make_dense_state()
    sharded, _ = built()
    start.load(sharded, features)
    return whole(world, fresh.state()), whole(world, sharded.state())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_weights_tables_and_states_are_loaded_on_any_number_of_ranks(trained: dict[str, Path], world_size: int) -> None:
    _, found = run_distributed(started, trained["side"], config_of("side"), world_size=world_size)[0]
    saved = weights(trained["side"])
    assert found.keys() == saved.keys()
    for name, value in saved.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_warm_start_accepts_another_plan_and_other_optimizer_settings(trained: dict[str, Path]) -> None:
    config = config_of(
        "sid_ngram", sharding={"types": ["table_wise"]}, training={"sparse_learning_rate": 0.5, "batch_size": 128}
    )
    _, found = run_distributed(started, trained["sid_ngram"], config, world_size=2)[0]
    for name, value in weights(trained["sid_ngram"]).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_rows_of_new_ids_are_initialized_as_in_a_new_table(world: World, trained: dict[str, Path]) -> None:
    fresh, found = started(world, trained["sid_ngram"], config_of("sid_ngram"), LARGER)
    for name, old in weights(trained["sid_ngram"]).items():
        assert torch.equal(found[name][: len(old)] if old.dim() else found[name], old), name
        if old.dim():
            assert torch.equal(found[name][len(old) :], fresh[name][len(old) :]), name
    assert len(found["model.bags.embedding_bags.t_item_id.weight"]) == LARGER.num_items


def test_stage_continues_the_steps_of_the_earlier_training(
    world: World, dataset: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    train_ranker(world, dataset, tmp_path / "next", "side", start=trained["side"], **ONCE)
    train_ranker(world, dataset, tmp_path / "fresh", "side", **ONCE)
    first, fresh, before = (summary(out) for out in (tmp_path / "next", tmp_path / "fresh", trained["side"]))
    assert first["starts_from"] == {"path": str(trained["side"]), "sids_anew": False}
    assert fresh["starts_from"] is None
    steps = weights(tmp_path / "next")["optimizer.body.interaction.over_arch.0.weight.step"]
    assert int(steps) == first["steps"] + before["steps"]
    assert not predictions(tmp_path / "next").equals(predictions(tmp_path / "fresh"))


@pytest.mark.parametrize("has_start", [True, False])
def test_restarted_tables_equal_those_at_the_start_of_the_training(
    world: World, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, has_start: bool
) -> None:
    config = config_of("sid_ngram")
    features = arm_features(LARGER, config, {"sid": SID})  # has rows that the earlier ranker lacks
    start = open_start(trained["sid_ngram"], config, LARGER, features) if has_start else None
    model = start_model(features, config, world, ModelConstants(), Traffic(), start)
    model.sharded.make_dense_state()
    began = whole(world, model.sharded.state())
    for parts in model.sharded.parted_state(features)[1].values():
        for part in parts.parts:
            part.tensor.fill_(0.5)
    weight = model.sharded.model.module.body.interaction.over_arch[0].weight
    with torch.no_grad():
        weight.fill_(0.25)
    caches: list[int] = []
    monkeypatch.setattr(SplitTableBatchedEmbeddingBagsCodegen, "reset_cache_states", lambda _: caches.append(1))
    model.restart_tables()
    assert len(caches) == 3  # one fbgemm module each for the rows' bags, the requests' bags and the sequences
    found = whole(world, model.sharded.state())
    for name, value in began.items():
        if not name.endswith("over_arch.0.weight"):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    assert (weight == 0.25).all()


@pytest.mark.parametrize(
    ("arm", "anew"),
    [
        ("side", {"omega", "layers.0.weight", "layers.0.bias"}),
        ("sid_ngram", {"t_item_sid", "t_history_sids"}),
        ("hde", {"t_item_sid", "t_history_sids", "projection"}),
    ],
)
def test_sids_of_another_encoder_are_refused_or_restart_their_weights(
    world: World, trained: dict[str, Path], arm: str, anew: set[str]
) -> None:
    with pytest.raises(SpecError, match=r"SIDs 'sid' have fingerprint ba.*, the ranker was trained on ab.*start_sids"):
        started(world, trained[arm], config_of(arm), sid=OTHER)
    fresh, found = started(world, trained[arm], config_of(arm, training={"start_sids": "anew"}), sid=OTHER)
    kept: list[str] = []
    gone: list[str] = []
    for name, old in weights(trained[arm]).items():
        belongs = any(re.search(rf"\b{part}(_prefix_\d)?\b", name) for part in anew) and "interaction" not in name
        belongs = belongs and not (arm == "side" and "layers" in name and "content" not in name)
        wanted = fresh[name] if belongs else old
        assert torch.equal(found[name], wanted), name
        (gone if belongs else kept).append(name)
    assert {part for part in anew if any(part in name for name in gone)} == anew
    assert any("content.layers.2" in name for name in kept) == (arm == "side")


@pytest.mark.parametrize(
    ("config", "spec", "error", "message"),
    [
        (config_of("sid_ngram"), {}, ConfigError, "is arm 'side', whose content differs from that of 'sid_ngram'"),
        (config_of("side", model={"cross_rank": 4, "history": {"queries": 2}}), {}, ConfigError,
         r"ranker\.model\.history, ranker\.model\.cross_rank: are not those"),
        (config_of("side"), {"dense": ("price", "rank")}, DataError,
         "dense: the ranker has rank, price, the dataset price, rank"),
        (config_of("side"), {"tasks": {"like": TaskSpec()}}, DataError,
         "tasks: the ranker has click, conversion, the dataset like"),
        (config_of("side"), {"num_users": 59}, DataError, r"t_user_id.*was saved with shape \(60, 8\), now has \(59"),
    ],
)  # fmt: skip
def test_ranker_that_does_not_fit_is_refused_naming_the_difference(
    world: World, trained: dict[str, Path], config: DecidedConfig, spec: dict[str, Any],
    error: type[SidestackError], message: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        started(world, trained["side"], config, SPEC.model_copy(update=spec))


def test_folder_without_a_ranker_is_refused(world: World, trained: dict[str, Path], tmp_path: Path) -> None:
    with committing(tmp_path / "other", world, stage="encoder"):
        pass
    with pytest.raises(DataError, match="is an output of stage 'encoder'; a trained ranker is one of stage 'ranker'"):
        open_bundle(tmp_path / "other")
    with committing(tmp_path / "empty", world, stage="ranker"):
        pass
    with pytest.raises(DataError, match="holds no trained ranker"):
        open_bundle(tmp_path / "empty")


def test_bundle_describes_its_ranker(trained: dict[str, Path]) -> None:
    described = open_bundle(trained["side"]).description
    assert described.rows["t_user_id"] == SPEC.num_users
    assert (described.config.training.epochs, described.sids, described.spec) == (2, {"sid": SID}, SPEC)


def test_tables_restart_when_start_tables_is_anew(trained: dict[str, Path]) -> None:
    config = config_of("sid_ngram", training={"start_tables": "anew"})
    fresh, found = run_distributed(started, trained["sid_ngram"], config, world_size=2)[0]
    saved = weights(trained["sid_ngram"])
    tables = [name for name in saved if table_of(name) is not None]
    assert tables and len(tables) < len(saved)
    for name in saved:
        expected = fresh[name] if name in tables else saved[name]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0, msg=name)
        if name in tables and name.endswith("weight"):
            assert not torch.equal(found[name], saved[name])
