"""The `retrain` and `judge` sections."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from sidestack.infra.config import Config, Days, Seed
from sidestack.ranker.config import Dates

PolicyName = Literal["append", "refresh", "rebuild", "never"]
"""What happens to the encoders in a cycle. `append`: they stay, and what is new is encoded. `refresh`: their networks
are trained on, codebooks stay. `rebuild`: they are trained anew, and SIDs with them. `never`: neither encoders nor
ranker change after the first version, as a control."""

JUDGE = "judge"
"""The stage, and the section, that measures candidates and opens or closes gates."""


class Bounds(Config):
    """Where a figure must lie, inclusive."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _check(self) -> "Bounds":
        if self.min is None and self.max is None:
            raise ValueError("names neither min nor max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min={self.min:g} is above max={self.max:g}")
        return self

    def holds(self, figure: float) -> bool:
        """Tell whether a figure lies inside; what is not a number does not."""
        return (self.min is None or figure >= self.min) and (self.max is None or figure <= self.max)

    def __str__(self) -> str:
        """Say the rule in a few words."""
        if self.min is None:
            return f"at most {self.max:g}"
        return f"at least {self.min:g}" if self.max is None else f"{self.min:g} to {self.max:g}"


class GatesConfig(Config):
    """What must hold before a candidate takes the champion's place."""

    tasks: tuple[str, ...] | None = None
    """The tasks whose gates must be open; by default those without a parent. Another task keeps a candidate out only
    where it is shown to be worse: the upper end of the interval of its gain lies below minus `max_loss`."""
    max_loss: NonNegativeFloat = 0.005
    """How much of the champion's normalized entropy a candidate may lose, as a share: the lower end of the interval of
    its gain must not lie below minus this."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of that interval, over users."""
    resamples: PositiveInt = 1000
    seed: Seed = 0
    """Of the resamples."""
    max_ne: PositiveFloat = 1.0
    """A candidate whose normalized entropy is above has learned nothing."""
    calibration: Bounds = Bounds(min=0.8, max=1.25)
    """Predicted positives over those that there were."""
    min_positives: PositiveInt = 100
    """With fewer positives of a task on the judged dates there is no verdict, and so no promotion."""
    min_users: PositiveInt = 30
    """Likewise, users."""
    drift: dict[str, Bounds] = {"volume_change": Bounds(min=-0.9)}
    """By name, figures of `pipelines.drift` that must lie inside bounds."""


class EncoderPolicy(Config):
    """When and how encoders change."""

    policy: PolicyName = "append"
    published: Literal["keep", "move"] = "keep"
    """`refresh`: whether published SIDs stay, or move where the refreshed encoder says so."""
    every: PositiveInt = 1
    """`refresh` and `rebuild` come in each so-many-th cycle; in the others new items are appended."""
    when: dict[str, Bounds] = {}
    """Figures of the last cycle's drift; one that lies outside brings `refresh` or `rebuild` forward."""
    refresh_training: dict[str, Any] = {}
    """`refresh`: settings of `encoder.training` that differ from the first training's, such as fewer epochs."""
    rebuild_days: Days | None = None
    """`rebuild`: the newest so many dates, of whose rows a ranker with new SIDs learns; by default all there are."""
    rebuild_tables: Literal["same", "anew"] = "anew"
    """`rebuild`: whether the champion's tables of ids go on, or start anew with its network. The champion has learned
    these dates, and tables that know their labels are trusted too much after a second pass (docs/results/replay.md)."""


class RetrainConfig(Config):
    """The `retrain` section."""

    every_days: Days = 1
    """A cycle begins when so many new dates have arrived."""
    judged_days: Days = 1
    """The newest so many dates of each task's mature labels: candidate and champion are measured on them before the
    next cycle learns them."""
    encoder: EncoderPolicy = EncoderPolicy()
    gates: GatesConfig = GatesConfig()
    reference: bool = False
    """Whether each cycle also trains a ranker from scratch on all dates, to compare with."""
    training: dict[str, Any] = {"window_days": 1}
    """Settings of `ranker.training` in cycles that start from a champion. What neither sets and a rule would decide is
    the first training's batch size, and one epoch."""
    registered_model: str | None = Field(default=None, pattern=r"^[\w .-]+$")
    """Name in MLflow's registry, whose aliases `challenger` and `champion` are moved; by default `sidestack-` and the
    run's name, as two runs cannot share a champion."""


class JudgeConfig(Config):
    """The `judge` section: written by a cycle, not by people."""

    measured: dict[str, Dates]
    """By task, the dates that are judged."""
    gates: GatesConfig = GatesConfig()
