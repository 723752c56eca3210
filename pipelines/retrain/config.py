"""The `retrain` and `judge` sections."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from sidestack.infra.config import Config, Days, Seed
from sidestack.ranker.config import Dates

PolicyName = Literal["append", "refresh", "rebuild", "never"]
"""What happens to the encoders in a cycle. `append`: they stay, and encode new items. `refresh`: their networks are
trained further, codebooks stay. `rebuild`: they are retrained from scratch, and all SIDs change. `never`: neither
encoders nor ranker change after the first version, as a control."""

JUDGE = "judge"
"""Name of the stage, and of the section, that measures candidates and evaluates gates."""


class Bounds(Config):
    """Inclusive bounds of a figure."""

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
        """Return whether a figure is within the bounds; False for NaN."""
        return (self.min is None or figure >= self.min) and (self.max is None or figure <= self.max)

    def __str__(self) -> str:
        """Return the rule in a few words."""
        if self.min is None:
            return f"at most {self.max:g}"
        return f"at least {self.min:g}" if self.max is None else f"{self.min:g} to {self.max:g}"


class GatesConfig(Config):
    """Conditions for a candidate to replace the champion."""

    tasks: tuple[str, ...] | None = None
    """The tasks whose gates must be open; by default those without a parent. Any other task blocks a candidate only if
    it is shown to be worse: the upper bound of its gain's interval is below -`max_loss`."""
    max_loss: NonNegativeFloat = 0.005
    """Maximum relative loss in normalized entropy against the champion: the lower bound of the gain's interval must not
    be below minus this."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Confidence of that interval, over users."""
    resamples: PositiveInt = 1000
    seed: Seed = 0
    """Seed of the resamples."""
    max_ne: PositiveFloat = 1.0
    """Maximum normalized entropy: a candidate above it has learned nothing."""
    calibration: Bounds = Bounds(min=0.8, max=1.25)
    """Bounds on predicted / observed positives."""
    min_positives: PositiveInt = 100
    """With fewer positives of a task on the judged dates there is no verdict, hence no promotion."""
    min_users: PositiveInt = 30
    """With fewer users there is no verdict either."""
    drift: dict[str, Bounds] = {"volume_change": Bounds(min=-0.9)}
    """Figures of `pipelines.drift` by name, with their bounds."""


class EncoderPolicy(Config):
    """When and how encoders change."""

    policy: PolicyName = "append"
    published: Literal["keep", "move"] = "keep"
    """`refresh`: whether published SIDs stay, or change to those of the refreshed encoder."""
    every: PositiveInt = 1
    """`refresh` and `rebuild` run in every n-th cycle; other cycles append new items."""
    when: dict[str, Bounds] = {}
    """Bounds on figures of the last cycle's drift; a figure outside triggers `refresh` or `rebuild` early."""
    refresh_training: dict[str, Any] = {}
    """`refresh`: settings of `encoder.training` that differ from the first training's, such as fewer epochs."""
    rebuild_days: Days | None = None
    """`rebuild`: number of newest dates on which a ranker with new SIDs is trained; by default all."""
    rebuild_tables: Literal["same", "anew"] = "anew"
    """`rebuild`: whether the champion's id tables are warm-started, or initialized anew while its network is kept. The
    champion was trained on these dates, and after a second pass its network relies too much on tables that memorized
    their labels (docs/results/replay.md)."""


class RetrainConfig(Config):
    """The `retrain` section."""

    every_days: Days = 1
    """Number of new dates that start a cycle."""
    judged_days: Days = 1
    """Number of newest dates with mature labels, by task, on which candidate and champion are measured; the next cycle
    learns them."""
    encoder: EncoderPolicy = EncoderPolicy()
    gates: GatesConfig = GatesConfig()
    reference: bool = False
    """Whether each cycle also trains a ranker from scratch on all dates, to compare with."""
    training: dict[str, Any] = {"window_days": 1}
    """Settings of `ranker.training` in cycles that start from a champion. If neither section sets them, the batch size
    is the first training's, and there is one epoch, instead of a rule's choice."""
    registered_model: str | None = Field(default=None, pattern=r"^[\w .-]+$")
    """Model name in MLflow's registry, with aliases `challenger` and `champion`; by default `sidestack-` and the run's
    name, as two runs cannot share a champion."""


class JudgeConfig(Config):
    """The `judge` section, written by a cycle, not by users."""

    measured: dict[str, Dates]
    """By task, the dates that are judged."""
    gates: GatesConfig = GatesConfig()
