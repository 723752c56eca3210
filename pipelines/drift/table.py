"""Drift as a short table for the terminal."""

from collections.abc import Iterator
from itertools import zip_longest

from pipelines.drift.result import CodeUse, Drift, LayerUse, Relative, SidDrift

_COLUMNS_SHOWN = 5
"""Columns whose PSI is shown, the largest first; the file has all."""
_GAP = "  "

Line = tuple[str, str, str, str]


def as_text(drift: Drift) -> str:
    """Render what changed: a figure a line, earlier (of SIDs before), now, and the change."""
    lines: list[Line] = [("", "earlier", "now", "change"), *_traffic(drift)]
    for name, one in drift.sids.items():
        lines += _sids(name, one)
    lines += _shifts(drift)
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    rows = []
    for what, *cells in lines:
        aligned = (cell.rjust(width) for cell, width in zip(cells, others, strict=True))
        rows.append(_GAP.join([what.ljust(first), *aligned]).rstrip())
    return "\n".join([_heading(drift), *rows, *_reasons(drift)]) + "\n"


def _heading(drift: Drift) -> str:
    new, earlier = drift.new_dates, drift.earlier_dates
    against = f"{len(earlier)} earlier ones, {earlier[0]} to {earlier[-1]}" if earlier else "no earlier ones"
    return f"drift: {len(new)} new dates, {new[0]} to {new[-1]}, against {against}"


def _traffic(drift: Drift) -> Iterator[Line]:
    yield _relative("impressions a day", drift.impressions_a_day, ",.0f")
    for task, rate in drift.label_rates.items():
        yield _relative(f"{task} rate", rate, ".4f")
    for what, new in (("items", drift.new_items), ("users", drift.new_users)):
        if new is not None:
            yield f"share of impressions with new {what}", "", _shown(new.of_impressions, ".2%"), ""
            yield f"share of {what} that are new", "", _shown(new.of_table, ".2%"), ""


def _sids(name: str, one: SidDrift) -> Iterator[Line]:
    if one.change is not None:
        for length, share in one.change.changed_share.items():
            yield f"{name}: SIDs changed in the first {length} digits", "", "", f"{share:.2%}"
        yield f"{name}: digits changed in a SID", "", "", f"{one.change.hamming:.2f}"
    yield from _use(name, one.before, one.now)
    for signal, loss in (one.reconstruction or {}).items():
        ratio = "" if loss.ratio is None else f"x {loss.ratio:.3f}"
        yield f"{name}: loss of {signal}, new items by old", _shown(loss.old, ".4f"), _shown(loss.new, ".4f"), ratio


def _use(name: str, before: CodeUse | None, now: CodeUse) -> Iterator[Line]:
    """Yield how codes are used; layers are beside each other by number, and one that was not there is empty."""
    collisions = before.collision_share if before else None
    yield f"{name}: SIDs shared with another", _shown(collisions, ".2%"), _shown(now.collision_share, ".2%"), ""
    for number, (old, new) in enumerate(zip_longest(before.layers if before else (), now.layers), start=1):
        for what, of_old, of_new in zip(("codes in use in", "entropy of"), _cells(old), _cells(new), strict=True):
            yield f"{name}: {what} layer {number}", of_old, of_new, ""


def _cells(use: LayerUse | None) -> tuple[str, str]:
    return ("", "") if use is None else (f"{use.in_use:.1%}", f"{use.entropy_share:.1%}")


def _shifts(drift: Drift) -> Iterator[Line]:
    known = [(value, column) for column, value in drift.psi.items() if value is not None]
    for value, column in sorted(known, key=lambda one: (-one[0], one[1]))[:_COLUMNS_SHOWN]:
        yield f"PSI of {column}", "", "", f"{value:.4f}"
    if len(known) > _COLUMNS_SHOWN:
        yield f"PSI of {len(known) - _COLUMNS_SHOWN} other columns", "", "", "less"


def _reasons(drift: Drift) -> Iterator[str]:
    for name, reason in drift.missing.items():
        yield f"not measured: {name}: {reason}"
    for sids, one in drift.sids.items():
        for name, reason in one.missing.items():
            yield f"not measured: {sids}: {name}: {reason}"


def _relative(what: str, one: Relative, form: str) -> Line:
    change = "" if one.change is None else f"{one.change:+.1%}"
    return what, _shown(one.earlier, form), _shown(one.new, form), change


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
