"""The ranker's configuration: arms, overlays, and the contents of a stage's key."""

from datetime import date

import pytest

from sidestack.infra.config import digest, parse
from sidestack.infra.errors import ConfigError
from sidestack.ranker.config import HoldoutConfig, RankerConfig
from tests.ranker.dataset import SPEC


def test_default_arms_are_the_four_that_are_compared() -> None:
    arms = RankerConfig().arms
    assert {name: (arm.item, arm.history) for name, arm in arms.items()} == {
        "none": ("none", "none"),
        "dense": ("dense", "dense"),
        "sid_ngram": ("sid_ngram", "sid_ngram"),
        "side": ("side", "side"),
    }


def test_unknown_arm_is_refused_listing_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'sidee' is unknown; arms are none, dense, sid_ngram, side"):
        parse(RankerConfig, {"arm": "sidee"}, "ranker")
    with pytest.raises(ConfigError, match="'densest' is unknown"):
        RankerConfig().resolved("densest")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainings": {}}, "ranker.trainings: unknown key"),
        ({"arms": {"side": {"item": "sids"}}}, "ranker.arms.side.item"),
        ({"model": {"embedding_dim": 30}}, "multiple of 4"),
        ({"model": {"history": {"heads": 3}}}, r"history.heads=3 must divide embedding_dim=32"),
        ({"model": {"history": {"pooling": "mean"}}}, "ranker.model.history.pooling"),
        ({"model": {"history": {"max_length": 0}}}, "ranker.model.history.max_length"),
        ({"training": {"children": "view"}}, "ranker.training.children"),
        ({"training": {"task_weights": {"click": 0}}}, "ranker.training.task_weights.click"),
        ({"model": {"table_rows": {"item_id": 0}}}, "ranker.model.table_rows.item_id"),
        ({"training": {"batch_size": 0}}, "ranker.training.batch_size"),
    ],
)
def test_bad_values_are_refused_naming_the_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(RankerConfig, values, "ranker")


def with_overlay(overlay: dict[str, object]) -> RankerConfig:
    return parse(RankerConfig, {"arm": "a", "arms": {"a": {"overlay": overlay}, "b": {}}}, "ranker")


@pytest.mark.parametrize(("key", "value"), [("sparse_learning_rate", 0.25), ("children", "entire_space")])
def test_overlay_changes_only_its_own_arm(key: str, value: object) -> None:
    config = with_overlay({"training": {key: value}})
    assert getattr(config.resolved("a").training, key) == value
    assert config.resolved("b").training == config.training


def test_overlay_of_the_history_keeps_its_other_settings() -> None:
    values = {"arm": "a", "arms": {"a": {"overlay": {"model": {"history": {"heads": 4}}}}, "b": {}}}
    config = parse(RankerConfig, {**values, "model": {"history": {"max_length": 9}}}, "ranker")
    history = config.resolved("a").model.history
    assert (history.heads, history.max_length) == (4, 9)
    assert config.resolved("b").model == config.model
    with pytest.raises(ConfigError, match=r"arm 'a'.*model\.history\.head\b"):
        with_overlay({"model": {"history": {"head": 4}}}).resolved("a")


def test_default_history_is_that_of_the_paper() -> None:
    history = RankerConfig().model.history
    assert (history.heads, history.pooling, history.encoder_layers, history.max_length) == (1, "pma", 0, None)


@pytest.mark.parametrize("overlay", [{"training": {"seed": 1}}, {"model": {"embedding_dim": 64}}])
def test_an_overlay_may_not_change_what_arms_share(overlay: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be equal in all arms"):
        with_overlay(overlay)


def test_an_overlay_of_a_wrong_value_is_refused_when_resolved() -> None:
    with pytest.raises(ConfigError, match=r"arm 'a'.*sparse_learning_rate"):
        with_overlay({"training": {"sparse_learning_rate": -1}}).resolved("a")


def test_key_of_a_resolved_arm_does_not_depend_on_other_arms() -> None:
    config = with_overlay({"training": {"warmup_steps": 3}})
    changed = config.model_copy(update={"arms": {**config.arms, "b": RankerConfig().arms["side"]}})
    assert digest(config.resolved("a")) == digest(changed.resolved("a"))
    assert digest(config.resolved("b")) != digest(changed.resolved("b"))
    assert config.resolved("a").resolved() == config.resolved("a")


def test_validation_holds_out_the_last_training_dates_and_leaves_the_test_dates_alone() -> None:
    assert HoldoutConfig().windows(SPEC) == (SPEC.train, SPEC.test)
    fitting, held_out = HoldoutConfig(kind="validation", validation_days=1).windows(SPEC)
    assert fitting == (date(2024, 1, 1), date(2024, 1, 3))
    assert held_out == (date(2024, 1, 4), date(2024, 1, 4))
    with pytest.raises(ConfigError, match=r"validation_days=4: training is 2024-01-01 to 2024-01-04"):
        HoldoutConfig(kind="validation", validation_days=4).windows(SPEC)
