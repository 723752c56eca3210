"""Human-readable numbers."""

from collections.abc import Sequence


def byte_size(num: float) -> str:
    """Return a size in binary units with three digits: ``0 B``, ``12.1 MiB``."""
    if abs(num) < 1024:
        return f"{num:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        num /= 1024
        if abs(num) < 1000:
            return f"{_three_digits(num)} {unit}"
    return f"{_three_digits(num / 1024)} TiB"


def scaled(num: float) -> str:
    """Return a count or rate in thousands or millions with three digits: ``12.3 k``."""
    if abs(num) < 1000:
        return _three_digits(num)
    if abs(num) < 999_500:
        return f"{_three_digits(num / 1e3)} k"
    return f"{_three_digits(num / 1e6)} M"


def percent(share: float, decimals: int = 2) -> str:
    """Return a share as signed percent: ``+1.21 %``; a value that rounds to 0 has no sign."""
    text = f"{100 * share:+.{decimals}f}"
    return f"{text if float(text) else text[1:]} %"


def deviation(share: float | None, decimals: int = 2) -> str:
    """Return a standard deviation as percent: ``0.12 %``; empty if there is none."""
    return "" if share is None else f"{100 * share:.{decimals}f} %"


def percent_interval(bounds: Sequence[float], decimals: int = 2) -> str:
    """Return two bounds as percent: ``+0.81 to +1.61 %``."""
    low, high = bounds
    return f"{percent(low, decimals).removesuffix(' %')} to {percent(high, decimals)}"


def unbroken(text: str) -> str:
    """Keep a number and its unit on one line."""
    return text.replace(" ", "\u00a0")


def duration(seconds: float) -> str:
    """Return a duration: ``41 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _three_digits(num: float) -> str:
    magnitude = abs(num)
    return f"{num:.0f}" if magnitude >= 99.95 else f"{num:.1f}" if magnitude >= 9.995 else f"{num:.2f}"
