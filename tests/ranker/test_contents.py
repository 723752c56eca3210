"""Kinds of content: what the registry accepts, and what positions must agree on."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import sidestack.ranker.contents
from sidestack.infra.errors import ConfigError, SpecError
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.contents import OWN, content_kinds
from sidestack.ranker.contents.contract import Content, Place
from sidestack.ranker.contents.dense import Dense
from sidestack.ranker.features import arm_features
from tests.ranker.dataset import SIDS, SPEC
from tests.ranker.training import ARMS, config_with


@dataclass(frozen=True)
class FirstSignal(Dense):
    """Content that consists of only the first embedding."""

    @classmethod
    def at(cls, place: Place) -> "FirstSignal":
        return cls(place.position, columns=(place.id_column,), embeddings=dict([*place.spec.embeddings.items()][:1]))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Return a dictionary whose kinds are registered like those of an installed package."""
    kinds: dict[str, object] = {}
    monkeypatch.setattr(sidestack.ranker.contents, "with_plugins", lambda group, own: {**own, **kinds})
    content_kinds.cache_clear()
    yield kinds
    content_kinds.cache_clear()


@pytest.mark.parametrize("kind", [Content, "content", 3, dict], ids=["abstract", "text", "number", "another class"])
def test_entry_point_without_a_kind_of_content_is_refused(added: dict[str, object], kind: object) -> None:
    added["theirs"] = kind
    with pytest.raises(
        ConfigError, match="entry point 'theirs' of group 'sidestack.contents': must name a subclass of"
    ):
        content_kinds()


def test_misspelt_kind_is_refused_listing_the_known_kinds(added: dict[str, object]) -> None:
    added["first"] = FirstSignal
    with pytest.raises(ConfigError, match=r"a\.user: is no kind .*none, .*, first; did you mean 'kmeans'\?"):
        config_with({"user": "kmean"})


def test_item_and_history_must_use_the_same_embeddings(added: dict[str, object]) -> None:
    added["first"] = FirstSignal
    config = config_with({"item": "first", "history": "first"})
    assert arm_features(SPEC, config, SIDS).constants.embeddings == {"item": {"words": 6}}
    config = config_with({"item": "first", "history": "dense"})
    with pytest.raises(
        SpecError, match="'dense': takes the embeddings words, behaviour; another position takes words,"
    ):
        arm_features(SPEC, config, SIDS)


@pytest.mark.parametrize("arm", ARMS)
def test_content_is_none_latent_or_looked_up(arm: str) -> None:
    features = arm_features(SPEC, config_with(ARMS[arm]), SIDS)
    for content in features.contents:
        books = {sid.name: torch.zeros(sid.digits, sid.radix, 5) for sid in content.codebooks}
        latent = content.latent(ModelConstants(books, {"item": torch.zeros(SPEC.num_items, 10)}))
        assert (content.is_none, bool(content.tables), latent is not None).count(True) == 1
        assert bool(content.columns) == (latent is not None)
        if content.sids:
            assert type(content).takes_sids


def test_only_side_arms_with_several_lines_need_codebooks() -> None:
    wanted = {
        arm: [sid.name for sid in arm_features(SPEC, config_with(ARMS[arm]), SIDS).constants.codebooks] for arm in ARMS
    }
    assert {arm: names for arm, names in wanted.items() if names} == {"side_lines": ["lines"], "side_two": ["lines"]}


def test_sids_of_an_arm_are_used_only_by_kinds_that_take_sids() -> None:
    taken = {kind: config_with({"item": kind}).content.used_sids for kind in OWN}
    assert taken == {kind: () if kind in ("none", "dense") else ("sid",) for kind in OWN}
