"""Prefix n-grams of Semantic IDs, each embedded in a table, and summed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from sidestack.encoder.sid.columns import sid_columns
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.errors import SpecError
from sidestack.ranker.contents.contract import Color, Content, Place
from sidestack.ranker.id_feature import IdFeature, sid_rows


@dataclass(frozen=True)
class SidNgram(Content):
    """The prefixes of the arm's `prefix_lengths`, or all materialized ones."""

    takes_sids = True
    color = Color("#d55e00", "#ff8a3d")

    @classmethod
    def at(cls, place: Place) -> Self:
        """Return content that looks prefixes up, in one table per length and set of SIDs."""
        return cls.from_tables(place, [table for sid in place.own_sids() for table in _tables(place, sid)])


def _tables(place: Place, sid: SidSpec) -> Iterator[IdFeature]:
    lengths = place.arm.prefix_lengths or sid.prefix_lengths
    if not lengths:
        raise SpecError(f"arm content {place.kind!r}: the dataset's SIDs {sid.name!r} have no prefix columns")
    for length in lengths:
        yield prefix_table(place, sid, length)


def prefix_table(place: Place, sid: SidSpec, length: int) -> IdFeature:
    """Return the id feature of a prefix.

    Raises:
        SpecError: it was not materialized, or does not fit one column.
    """
    columns = list(sid_columns(place.stem(sid), place.prefix(sid, length)))
    if len(columns) > 1:
        raise SpecError(
            f"arm content {place.kind!r}: a prefix of {length} digits takes {len(columns)} columns, must be one"
        )
    first = 1 if sid.packing == "paper_eq5" else 0
    num_ids = sid.radix ** (length + first)
    rows = sid_rows(num_ids, place.num_ids, place.arm.max_rows)
    return IdFeature(columns[0], num_ids, rows, place.of_request, sid)
