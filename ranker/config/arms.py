"""The arms: how content reaches the ranker, each in a few lines."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, PositiveInt, field_validator

from sidestack.encoder.sid.spec import DEFAULT_NAME
from sidestack.infra.config import Config, FileName, suggestion
from sidestack.ranker.contents import content_kinds
from sidestack.ranker.contents.contract import Position


def _require_kind(name: str) -> str:
    kinds = content_kinds()
    if name not in kinds:
        raise ValueError(f"is no kind of content; known are {', '.join(kinds)}{suggestion(name, kinds)}")
    return name


ContentKind = Annotated[str, AfterValidator(_require_kind)]
"""How content enters: the name of a kind in `ranker.contents.content_kinds`, ours or an installed package's."""


def _refuse_replicates_name(name: str) -> str:
    if re.search(r"-r\d+$", name):
        raise ValueError("must not end as a replicate's label does (-r1)")
    return name


ArmName = Annotated[FileName, AfterValidator(_refuse_replicates_name)]
"""The name of an arm. Directories are named after it; those of replicates append `-r` and their number."""

OVERLAY_KEYS = {
    "training": ("sparse_learning_rate", "dense_learning_rate", "warmup_share", "warmup_steps", "children"),
    "model": ("history",),
}
"""The settings that an arm may overlay: those that may be tuned for it, and its attention to the history. Data order,
seed, sizes and budget stay equal, so that arms can be compared."""


class ArmConfig(Config):
    """How content reaches the ranker in one arm."""

    item: ContentKind = "none"
    """The ad's own content."""
    history: ContentKind = "none"
    """The content of the items in the user's history."""
    user: ContentKind = "none"
    """The user's own content, such as what the user did elsewhere (second paper)."""
    sids: tuple[str, ...] = (DEFAULT_NAME,)
    """Which of the dataset's sets of SIDs enter (not for `none` and `dense`): sets of items at the ad's position and
    the history's, sets of users at the user's. Several sets may enter together."""
    prefix_lengths: tuple[PositiveInt, ...] | None = None
    """`sid_ngram` and `hde`: which of the materialized prefixes; by default all. `side`: the one prefix that is
    unpacked; by default the whole SID."""
    clusters: PositiveInt | None = None
    """`kmeans`: how many of the nearest clusters; by default all that the SID has."""
    embeddings: tuple[str, ...] = ()
    """`dense`: which of the items' and users' embeddings, each at its position; by default all."""
    max_rows: PositiveInt | None = None
    """The maximum of rows of a SID table; a prefix with more ids is hashed by modulo (collisions). By default a power
    of two that follows from the number of items or users (`ranker.id_feature.sid_rows`); if a dataset grows past it,
    the table has another size."""
    scale_steps: bool = True
    """Whether `side` multiplies each centred digit by the codebook's recorded step, over the mean step."""
    overlay: dict[str, dict[str, Any]] = {}
    """Settings of this arm alone: `training: {sparse_learning_rate: 0.02}`, `model: {history: {heads: 4}}`."""

    @property
    def kinds(self) -> dict[Position, str]:
        """The kind of content at each position."""
        return {"item": self.item, "history": self.history, "user": self.user}

    @property
    def used_sids(self) -> tuple[str, ...]:
        """The sets of SIDs that some position takes."""
        return self.sids if any(content_kinds()[kind].takes_sids for kind in self.kinds.values()) else ()

    @field_validator("sids")
    @classmethod
    def _check_sids(cls, sids: tuple[str, ...]) -> tuple[str, ...]:
        if not sids or len(set(sids)) < len(sids):
            raise ValueError(f"{list(sids)} must name at least one set of SIDs, each once")
        return sids

    @field_validator("overlay")
    @classmethod
    def _check_overlay(cls, overlay: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for section, values in overlay.items():
            allowed = OVERLAY_KEYS.get(section, ())
            for key in values:
                if key not in allowed:
                    known = ", ".join(f"{name}.{one}" for name, ones in OVERLAY_KEYS.items() for one in ones)
                    raise ValueError(f"{section}.{key} must be equal in all arms; an overlay may set {known}")
        return overlay
