"""What is measured of drift, as `drift.json` holds it, and its figures by name.

A figure that cannot be measured is null, and the `missing` beside it says why.
"""

from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any, Self

from sidestack.infra.config import Config, parse
from sidestack.infra.tables import Entity

DRIFT_FILE = "drift.json"

Figure = tuple[str, float | None]


class Relative(Config):
    """A mean of the new dates against the earlier ones."""

    new: float | None
    earlier: float | None
    change: float | None
    """new / earlier - 1."""

    @classmethod
    def of(cls, new: float | None, earlier: float | None) -> Self:
        """Compare two means; one that is not known, or 0 earlier, has no change."""
        change = new / earlier - 1 if new is not None and earlier else None
        return cls(new=new, earlier=earlier, change=change)


class Newcomers(Config):
    """Items (users) that the snapshot before lacks."""

    of_impressions: float | None
    """Share of the new dates' impressions that are of one; None: there is no impression."""
    of_table: float | None
    """Share of all items (users) of the snapshot now; None: there are none."""


class SidChange(Config):
    """What became of the SIDs of the items (users) that both snapshots know."""

    compared: int
    """Ids that have a SID in both; all shares are of these."""
    null_before: int
    """Ids without a SID before, and with one now."""
    null_now: int
    """Ids with a SID before, and without one now."""
    null_both: int
    """Ids that have a SID in neither."""
    changed_share: dict[int, float]
    """By number of first digits: the share of ids of which one of these digits changed. The last number is all."""
    hamming: float
    """How many digits of an id changed, in the mean."""


class LayerUse(Config):
    """How the codes of a layer are used, in the mean over the digits of its groups."""

    in_use: float
    """Share of the codes that some item has."""
    entropy_share: float
    """The codes' entropy, as a share of what it is where all codes are used alike."""


class CodeUse(Config):
    """How a set of SIDs is used in one snapshot."""

    rows: int
    """Items (users) with a SID."""
    null: int
    """Items (users) without one."""
    layers: tuple[LayerUse, ...]
    """The coarsest first."""
    collision_share: float | None
    """Share of the rows that share their whole SID with another; None: there are no rows."""


class SignalLoss(Config):
    """Reconstruction loss of a signal: its mean by `encoder.evaluation.evaluate`."""

    new: float | None
    """Over new items (users) that have the signal; None: none has."""
    old: float | None
    """Over old ones."""
    ratio: float | None
    """new / old."""

    @classmethod
    def of(cls, new: float | None, old: float | None) -> Self:
        """Compare two losses; one that is not known, or an old one of 0, has no ratio."""
        return cls(new=new, old=old, ratio=new / old if new is not None and old else None)


class SidDrift(Config):
    """Drift of one set of SIDs."""

    entity: Entity
    same_encoder: bool | None = None
    """Whether both snapshots' SIDs are of one encoder; None: there are none before."""
    change: SidChange | None = None
    now: CodeUse
    before: CodeUse | None = None
    reconstruction: dict[str, SignalLoss] | None = None
    """By signal."""
    missing: dict[str, str] = {}
    """Why fields are null, by name."""

    def without(self, reason: str, *names: str) -> "SidDrift":
        """Return the same with a reason why some fields are null."""
        return self.model_copy(update={"missing": {**self.missing, **dict.fromkeys(names, reason)}})

    def figures(self, name: str) -> Iterator[Figure]:
        """Yield the figures of a set of this name."""
        if self.change is not None:
            for length, share in self.change.changed_share.items():
                yield f"sid_changed_share.{name}.{length}", share
            yield f"sid_hamming.{name}", self.change.hamming
        for suffix, use in (("", self.now), ("_before", self.before)):
            if use is not None:
                yield f"collision_share{suffix}.{name}", use.collision_share
                for layer, of_layer in enumerate(use.layers, start=1):
                    yield f"codes_in_use{suffix}.{name}.{layer}", of_layer.in_use
                    yield f"code_entropy_share{suffix}.{name}.{layer}", of_layer.entropy_share
        for signal, loss in (self.reconstruction or {}).items():
            yield f"reconstruction_new.{name}.{signal}", loss.new
            yield f"reconstruction_old.{name}.{signal}", loss.old
            yield f"reconstruction_ratio.{name}.{signal}", loss.ratio


class Drift(Config):
    """The content of `drift.json`."""

    new_dates: tuple[date, ...]
    earlier_dates: tuple[date, ...]
    """What the new dates are held against: the last dates before the first of them."""
    sids: dict[str, SidDrift]
    """By set."""
    new_items: Newcomers | None
    new_users: Newcomers | None
    impressions_a_day: Relative
    label_rates: dict[str, Relative]
    """By task: positives among the rows on which it is judged and whose label is known."""
    psi: dict[str, float | None]
    """By dense and sparse column: the population stability index of the new dates against the earlier ones."""
    missing: dict[str, str] = {}
    """Why fields are null, by name."""

    def figures(self) -> Iterator[Figure]:
        """Yield all figures; None where one could not be measured."""
        for name, one in self.sids.items():
            yield from one.figures(name)
        for what, newcomers in (("item", self.new_items), ("user", self.new_users)):
            if newcomers is not None:
                yield f"new_{what}_share", newcomers.of_impressions
                yield f"new_{what}_share_of_{what}s", newcomers.of_table
        yield "impressions_a_day", self.impressions_a_day.new
        yield "volume_change", self.impressions_a_day.change
        for task, rate in self.label_rates.items():
            yield f"label_rate.{task}", rate.new
            yield f"label_rate_change.{task}", rate.change
        for column, value in self.psi.items():
            yield f"psi.{column}", value


def figures(drift_json: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a `drift.json` by name, such as `psi.price`; those that are null are left out.

    Raises:
        ConfigError: the data is no drift.
    """
    return {name: value for name, value in parse(Drift, drift_json, DRIFT_FILE).figures() if value is not None}
