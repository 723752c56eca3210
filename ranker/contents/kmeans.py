"""The ids of an item's nearest clusters, embedded in one table."""

from dataclasses import dataclass
from typing import Self

from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.errors import SpecError
from sidestack.ranker.contents.contract import Color, Content, Place
from sidestack.ranker.id_feature import CLUSTERS, IdFeature, sid_rows


@dataclass(frozen=True)
class Kmeans(Content):
    """The arm's `clusters` nearest clusters, or all that the SID has, summed."""

    takes_sids = True
    color = Color("#a8528a", "#e39acb")

    @classmethod
    def at(cls, place: Place) -> Self:
        """Return content that looks clusters up, in one table per set of SIDs."""
        return cls.from_tables(place, [_table(place, sid) for sid in place.own_sids()])


def _table(place: Place, sid: SidSpec) -> IdFeature:
    clusters = sid.digits if place.arm.clusters is None else place.arm.clusters
    if clusters > sid.digits:
        raise SpecError(f"arm content {place.kind!r}: clusters={clusters}; the SIDs {sid.name!r} name {sid.digits}")
    if sid.packing != "mixed_radix" or sid.levels > 1:
        raise SpecError(f"arm content {place.kind!r}: the SIDs {sid.name!r} ({sid.quantizer}) are no clusters' numbers")
    rows = sid_rows(sid.radix, sid.radix, place.arm.max_rows)  # every cluster has items
    return IdFeature(f"{place.stem(sid)}{CLUSTERS}", sid.radix, rows, place.of_request, sid, clusters)
