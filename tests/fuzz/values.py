"""Draw unexpected values and put them into plain data."""

import copy
import math
from collections.abc import Iterator
from datetime import date, datetime
from typing import Any

from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**40]),
    st.floats(),
    st.sampled_from([1e-320, 1e308, math.inf, math.nan, -0.0]),
    st.text(max_size=8),
    st.sampled_from(
        ["", "none", "on", "../x", "/etc/passwd", "a\nb", "a b", "\0", "\u2028", "x" * 300, "1e9", "inf", "$(x)"]
    ),
    st.sampled_from([date(1, 1, 1), date(9999, 12, 31), datetime(2024, 1, 1, 12)]),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
KEYS = st.one_of(st.text(max_size=6), st.sampled_from(["", "..", "arms", "seed", "x" * 300, "a.b", "a\nb"]))


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every mapping or list inside plain data, with each of its keys or indices."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield values, key
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def mutated(draw: st.DrawFn, valid: Any) -> Any:
    """Draw valid data with one to three faults: a value replaced, or a key removed, added or renamed."""
    values = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(values))
        if not found:
            break
        holder, key = draw(st.sampled_from(found))
        kind = draw(st.sampled_from(["replace", "remove", "add", "rename"]))
        if kind == "replace" or (kind == "rename" and isinstance(holder, list)):
            holder[key] = draw(VALUES)
        elif kind == "remove":
            del holder[key]
        elif kind == "rename":
            holder[draw(KEYS)] = holder.pop(key)
        elif isinstance(holder, dict):
            holder[draw(KEYS)] = draw(VALUES)
        else:
            holder.append(draw(VALUES))
    return values
