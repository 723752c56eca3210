"""The `tables` section: the papers' tables, by the arms that each holds against each other."""

from pydantic import model_validator

from sidestack.infra.config import Config
from sidestack.ranker.metric_registry import HEADLINE, compared_metrics


class PaperFigures(Config):
    """What a paper's table has of one arm."""

    cost: float | None = None
    """Incremental cost, over that of the table's first arm."""
    gains: dict[str, float] = {}
    """Gain in per cent by the table's metric, by the name of a task."""
    gain: float | None = None
    """Gain in per cent by the table's metric, where the paper gives one and not one a task."""
    roi: float | None = None
    """Return on investment, over that of the table's first arm."""
    storage: float | None = None
    """How many times smaller it is stored than the embedding it quantizes."""


class TableConfig(Config):
    """One table of a paper: the arms that are held against each other."""

    title: str
    arms: tuple[str, ...]
    """Of `ranker.arms`, the reference among them."""
    reference: str = "none"
    """The arm that gains are over."""
    metric: str = HEADLINE.name
    """What gains are shown in: normalized entropy, as in the SIDE paper, AUC, as in the second, or any other metric of
    `ranker.metric_registry` that has a gain."""
    storage_over: dict[str, str] = {}
    """By arm: the dense arm whose embeddings it quantizes; shows how many times smaller it is, and how much of the
    dense arm's gain it keeps."""
    differs: str
    """How our setting differs from the paper's."""
    paper: dict[str, PaperFigures] = {}
    """By arm: the paper's figures."""

    @model_validator(mode="after")
    def _check_metric(self) -> "TableConfig":
        known = [metric.name for metric in compared_metrics()]
        if self.metric not in known:
            raise ValueError(f"metric: {self.metric!r} must be one that has a gain, {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _check_arms(self) -> "TableConfig":
        for name in (self.reference, *self.paper, *self.storage_over, *self.storage_over.values()):
            if name not in self.arms:
                raise ValueError(f"{name!r} must be one of the table's arms, {', '.join(self.arms)}")
        return self
