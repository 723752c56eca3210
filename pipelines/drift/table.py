"""Drift as a short table for the terminal."""

from collections.abc import Iterator

from sidestack.pipelines.drift.result import CodeUse, Drift, Relative, SidDrift

_COLUMNS_SHOWN = 5
"""Number of columns whose PSI is shown, the largest first; the file has all."""
_WORST = ("codes in use, worst layer", "entropy of codes, worst layer")
_GAP = "  "

Line = tuple[str, str, str, str]


def as_text(drift: Drift) -> str:
    """Render what changed, one figure a line: the earlier value (for SIDs: the previous), the new one, the change."""
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
        yield _relative(f"{task} rate", rate)
    for what, new in (("items", drift.new_items), ("users", drift.new_users)):
        if new is not None:
            yield f"share of impressions with new {what}", "", _shown(new.of_impressions, ".2%"), ""
            yield f"share of {what} that are new", "", _shown(new.of_table, ".2%"), ""


def _sids(name: str, one: SidDrift) -> Iterator[Line]:
    """Yield a set's figures: of prefixes the shortest and the whole SID, of layers the worst. The file has all."""
    if one.change is not None:
        shares = one.change.changed_share
        for length in sorted({min(shares), max(shares)}):
            yield f"{name}: changed in the first {length} digits", "", "", f"{shares[length]:.2%}"
        yield f"{name}: digits changed in a SID", "", "", f"{one.change.hamming:.2f}"
    before, now = _use(one.before), _use(one.now)
    for what, old, new in zip((f"{one.entity}s that share a SID", *_WORST), before, now, strict=True):
        yield f"{name}: {what}", old, new, ""
    for signal, loss in (one.reconstruction or {}).items():
        ratio = "" if loss.ratio is None else f"x {loss.ratio:.3f}"
        yield f"{name}: loss of {signal}, old and new {one.entity}s", _shown(loss.old), _shown(loss.new), ratio


def _use(use: CodeUse | None) -> tuple[str, str, str]:
    if use is None:
        return "", "", ""
    in_use, entropy = (min(getattr(layer, name) for layer in use.layers) for name in ("in_use", "entropy_share"))
    return _shown(use.collision_share, ".2%"), f"{in_use:.1%}", f"{entropy:.1%}"


def _shifts(drift: Drift) -> Iterator[Line]:
    known = [(value, column) for column, value in drift.psi.items() if value is not None]
    for value, column in sorted(known, key=lambda one: (-one[0], one[1]))[:_COLUMNS_SHOWN]:
        yield f"PSI of {column}", "", "", f"{value:.4f}"
    if len(known) > _COLUMNS_SHOWN:
        yield f"PSI of {len(known) - _COLUMNS_SHOWN} other columns", "", "", "less"


def _reasons(drift: Drift) -> Iterator[str]:
    """Yield each reason once, with the fields it applies to."""
    of_sids = {f"{sids}.{name}": reason for sids, one in drift.sids.items() for name, reason in one.missing.items()}
    names: dict[str, list[str]] = {}
    for name, reason in {**drift.missing, **of_sids}.items():
        names.setdefault(reason, []).append(name)
    for reason, own in names.items():
        yield f"not measured, as {reason}: {', '.join(own)}"


def _relative(what: str, one: Relative, form: str = ".4f") -> Line:
    change = "" if one.change is None else f"{one.change:+.1%}"
    return what, _shown(one.earlier, form), _shown(one.new, form), change


def _shown(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)
