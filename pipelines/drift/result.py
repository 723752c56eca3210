"""The schema of `drift.json`, and its figures by name.

A figure that cannot be measured is null; `missing` has the reason.
"""

from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any, Self

from sidestack.infra.config import Config, parse
from sidestack.infra.tables import Entity

DRIFT_FILE = "drift.json"

Figure = tuple[str, float | None]


class Relative(Config):
    """A mean over the new dates, compared with the earlier ones."""

    new: float | None
    earlier: float | None
    change: float | None
    """new / earlier - 1."""

    @classmethod
    def of(cls, new: float | None, earlier: float | None) -> Self:
        """Compare two means; the change is None if either is unknown or the earlier one is 0."""
        change = new / earlier - 1 if new is not None and earlier else None
        return cls(new=new, earlier=earlier, change=change)


class Newcomers(Config):
    """Items (users) that the previous snapshot lacks."""

    of_impressions: float | None
    """Share of the new dates' impressions that show a new item (come from a new user); None without impressions."""
    of_table: float | None
    """Share of all items (users) of the current snapshot; None if there are none."""


class SidChange(Config):
    """Changes of the SIDs of the items (users) that are in both snapshots."""

    compared: int
    """Ids with a SID in both snapshots: the denominator of all shares."""
    null_before: int
    """Ids that had no SID before and have one now."""
    null_now: int
    """Ids that had a SID before and have none now."""
    null_both: int
    """Ids without a SID in either snapshot."""
    changed_share: dict[int, float]
    """Prefix length in digits -> share of ids whose prefix changed. The last length is the whole SID."""
    hamming: float
    """Mean number of changed digits of an id."""


class LayerUse(Config):
    """Use of a layer's codes, averaged over the digits of its groups."""

    in_use: float
    """Share of the codes that at least one item has."""
    entropy_share: float
    """The codes' entropy, as a share of the entropy of uniform use."""


class CodeUse(Config):
    """Code use of a set of SIDs in one snapshot."""

    rows: int
    """Items (users) with a SID."""
    null: int
    """Items (users) without one."""
    layers: tuple[LayerUse, ...]
    """The coarsest first."""
    collision_share: float | None
    """Share of the rows whose whole SID another row has too; None without rows."""


class SignalLoss(Config):
    """Reconstruction loss of a signal: its mean by `encoder.evaluation.evaluate`."""

    new: float | None
    """Over new items (users) that have the signal; None if none has it."""
    old: float | None
    """Over old items (users)."""
    ratio: float | None
    """new / old."""

    @classmethod
    def of(cls, new: float | None, old: float | None) -> Self:
        """Compare two losses; the ratio is None if either is unknown or the old one is 0."""
        return cls(new=new, old=old, ratio=new / old if new is not None and old else None)


class SidDrift(Config):
    """Drift of one set of SIDs."""

    entity: Entity
    same_encoder: bool | None = None
    """Whether one encoder made both snapshots' SIDs; None if there were none before."""
    change: SidChange | None = None
    now: CodeUse
    before: CodeUse | None = None
    reconstruction: dict[str, SignalLoss] | None = None
    """By signal."""
    missing: dict[str, str] = {}
    """Why fields are null, by name."""

    def without(self, reason: str, *names: str) -> "SidDrift":
        """Return a copy with the reason why some fields are null."""
        return self.model_copy(update={"missing": {**self.missing, **dict.fromkeys(names, reason)}})

    def figures(self, name: str) -> Iterator[Figure]:
        """Yield the figures of the set, which has this name."""
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
    """The dates that the new ones are compared with: the last before the first new date."""
    sids: dict[str, SidDrift]
    """By set."""
    new_items: Newcomers | None
    new_users: Newcomers | None
    impressions_a_day: Relative
    label_rates: dict[str, Relative]
    """By task: share of positives among the judged rows with a known label."""
    psi: dict[str, float | None]
    """By dense and sparse column: the population stability index of the new dates relative to the earlier ones."""
    missing: dict[str, str] = {}
    """Why fields are null, by name."""

    def figures(self) -> Iterator[Figure]:
        """Yield all figures; None for one that could not be measured."""
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
    """Return the figures of a `drift.json` by name, such as `psi.price`, without null ones.

    Raises:
        ConfigError: the data is not a valid `drift.json`.
    """
    return {name: value for name, value in parse(Drift, drift_json, DRIFT_FILE).figures() if value is not None}
