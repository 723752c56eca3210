"""The `tables` section: the papers' tables, with the arms that each compares."""

from pydantic import model_validator

from sidestack.infra.config import Config
from sidestack.ranker.metric_registry import HEADLINE, compared_metrics


class PaperFigures(Config):
    """A paper's figures of one arm."""

    cost: float | None = None
    """Incremental cost, relative to the table's first arm."""
    gains: dict[str, float] = {}
    """Gain in per cent by the table's metric, by task."""
    gain: float | None = None
    """Gain in per cent by the table's metric, if the paper gives one for all tasks together."""
    roi: float | None = None
    """Return on investment, relative to the table's first arm."""
    storage: float | None = None
    """Compression ratio of storage against the embedding it quantizes."""


class TableConfig(Config):
    """One table of a paper: the arms that are compared."""

    title: str
    arms: tuple[str, ...]
    """Names from `ranker.arms`, including the reference."""
    reference: str = "none"
    """The arm over which gains are computed."""
    metric: str = HEADLINE.name
    """The metric of gains: normalized entropy as in the SIDE paper, AUC as in the second, or any other metric of
    `ranker.metric_registry` with a gain."""
    storage_over: dict[str, str] = {}
    """Arm -> the dense arm whose embeddings it quantizes; adds compression ratio and share of its gain."""
    differs: str
    """How our setting differs from the paper's."""
    paper: dict[str, PaperFigures] = {}
    """Arm -> the paper's figures."""

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
