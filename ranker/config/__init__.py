"""The ranker's configuration: one model, and the arms, which define how content reaches it.

An arm is a few lines: how the Semantic ID enters at the ad's position and in the user's history, the settings of
its SID tables, and an overlay of settings tuned for this arm only. All else is equal across arms.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sidestack.infra.code import foreign_code
from sidestack.infra.config import Config, parse
from sidestack.infra.errors import ConfigError
from sidestack.ranker.config.arms import OVERLAY_KEYS, ArmConfig, ArmName
from sidestack.ranker.config.holdout import Dates, HoldoutConfig, iso_dates, without_newest
from sidestack.ranker.config.model import AdmissionConfig, HistoryConfig, ModelConfig
from sidestack.ranker.config.training import Children, ShardingConfig, TrainingConfig
from sidestack.ranker.contents import content_kinds

__all__ = [
    "OVERLAY_KEYS",
    "AdmissionConfig",
    "ArmConfig",
    "Children",
    "Dates",
    "HistoryConfig",
    "HoldoutConfig",
    "ModelConfig",
    "RankerConfig",
    "SearchBudget",
    "ShardingConfig",
    "TrainingConfig",
    "iso_dates",
    "without_newest",
]

SearchBudget = Literal["quick", "standard", "thorough"]
"""The budget of the search for learning rates; see `pipelines.studies.tune.config.RUNGS`."""

CONTEST = ("none", "dense", "sid_ngram", "side")
"""The kinds of content that are compared by default."""


def _same_kind(kind: str) -> ArmConfig:
    return ArmConfig(item=kind, history=kind)


class RankerConfig(Config):
    """The `ranker` section."""

    arm: str = "side"
    """Which of `arms` to train."""
    arms: dict[ArmName, ArmConfig] = Field(default_factory=lambda: {name: _same_kind(name) for name in CONTEST})
    """The compared arms by name; by default one for each kind of content."""
    budget: SearchBudget = "standard"
    """The budget of `pipelines.studies.tune` for each arm's learning rates, the same for every arm."""
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    sharding: ShardingConfig = ShardingConfig()
    holdout: HoldoutConfig = HoldoutConfig()

    @model_validator(mode="after")
    def _check_arm(self) -> "RankerConfig":
        if self.arm not in self.arms:
            raise ValueError(f"arm {self.arm!r} is unknown; arms are {', '.join(self.arms)}")
        return self

    @model_validator(mode="after")
    def _check_entries(self) -> "RankerConfig":
        entries, lanes = self.model.history.max_entries, self.training.lanes
        if entries is not None and entries < lanes:
            raise ValueError(f"model.history.max_entries={entries}: must be at least training.lanes={lanes}")
        return self

    @model_validator(mode="after")
    def _check_children(self) -> "RankerConfig":
        learned = self.holdout.learned
        if self.training.children == "entire_space" and len(set(learned.values())) > 1:
            raise ValueError(
                "training.children=entire_space learns all tasks of a row; holdout.learned has other dates"
            )
        return self

    @property
    def content(self) -> ArmConfig:
        """The chosen arm."""
        return self.arms[self.arm]

    def identity(self) -> dict[str, Any]:
        """Return what determines a training: all settings except the search budget, and the code of the kinds of
        content from other packages."""
        values = self.model_dump(mode="json", exclude={"budget"})
        kinds = {kind for arm in self.arms.values() for kind in arm.kinds.values()}
        foreign = foreign_code(content_kinds()[kind] for kind in kinds)
        return {**values, "foreign_code": foreign} if foreign else values

    def resolved(self, arm: str | None = None) -> Self:
        """Return the configuration of one arm alone: its overlay applied, `arms` reduced to it.

        Key, checkpoint and manifest hold the digest of this configuration: changing another arm does not change it.
        Resolving twice changes nothing.

        Args:
            arm: an arm's name; by default the one chosen.

        Raises:
            ConfigError: the arm is unknown, or its overlay does not fit the settings it overlays.
        """
        name = self.arm if arm is None else arm
        if name not in self.arms:
            raise ConfigError(f"ranker.arm: {name!r} is unknown; arms are {', '.join(self.arms)}")
        chosen = self.arms[name]
        values = _overlaid(self.model_dump(mode="json", exclude={"arms"}), chosen.overlay)
        bare = chosen.model_copy(update={"overlay": {}})
        values |= {"arm": name, "arms": {name: bare.model_dump(mode="json")}}
        return parse(type(self), values, f"ranker (arm {name!r})")


def _overlaid(values: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with an overlay merged into them, mapping by mapping."""
    laid = dict(values)
    for key, change in overlay.items():
        below = values.get(key)
        laid[key] = _overlaid(below, change) if isinstance(change, Mapping) and isinstance(below, Mapping) else change
    return laid
