"""Result of a sweep: the schema of `sweep.json`, and its table."""

from collections.abc import Iterator, Mapping, Sequence

from sidestack.infra.config import Config
from sidestack.pipelines.report.comparison import SignalLoss
from sidestack.pipelines.report.units import duration
from sidestack.pipelines.studies.sweep.grid import Setting

INPUT = "encoder."
"""Prefix of the encoders' names in the inputs of stage `sweep`."""


class SettingResult(Config):
    """One setting, measured on held-out items."""

    setting: Setting
    bits: float
    """Bits of the SID."""
    loss: float
    """Sum of the signals' losses times their weights: the criterion to minimize."""
    signals: tuple[SignalLoss, ...]
    unique_share: float
    """Distinct SIDs / items."""
    entropy_bits: float
    """Bits used: the sum of the digits' entropies."""
    seconds: float
    """Duration of training, without its start."""


class SweepResult(Config):
    """Result of a sweep."""

    weights: dict[str, float]
    """Weight of each signal in `loss`."""
    own: Setting
    """The configuration's own setting, which may be outside the sweep."""
    results: tuple[SettingResult, ...]
    """Best first."""

    @property
    def chosen(self) -> SettingResult:
        """The setting with the lowest loss."""
        return self.results[0]


def ranked(results: Sequence[SettingResult]) -> tuple[SettingResult, ...]:
    """Sort results by loss; ties by number of digits, as fewer are cheaper to unpack."""
    return tuple(sorted(results, key=lambda result: (result.loss, result.setting.digits, result.setting.name)))


def weighted_loss(signals: Sequence[SignalLoss], weights: Mapping[str, float]) -> float:
    """Return the weighted sum of signals' losses, as in training."""
    return sum(weights[signal.name] * signal.loss for signal in signals)


def as_text(sweep: SweepResult) -> str:
    """Render the table for the terminal, best setting first, without single signals' losses."""
    header, *rows = ([*head, mark] for head, _, mark in _cells(sweep))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, "─" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def as_markdown(sweep: SweepResult) -> str:
    """Render the table as Markdown, with every signal's loss."""
    header, *rows = ([*head, *signals, mark] for head, signals, mark in _cells(sweep))
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    lines.insert(1, "|---:" * len(header) + "|")
    return "\n".join(lines) + "\n"


def _cells(sweep: SweepResult) -> Iterator[tuple[list[str], list[str], str]]:
    """Return header and rows, each in three parts: the setting and its measures, the signals' losses, the mark."""
    names = [signal.name for signal in sweep.chosen.signals]
    yield ["levels", "depth", "groups", "digits", "bits", "used", "loss", "unique", "training"], names, ""
    for result in sweep.results:
        setting = result.setting
        head = [
            *(str(number) for number in (setting.levels, setting.depth, setting.groups, setting.digits)),
            *(f"{result.bits:.1f}", f"{result.entropy_bits:.1f}", f"{result.loss:.4f}"),
            *(f"{result.unique_share:.1%}", duration(result.seconds)),
        ]
        yield head, [f"{signal.loss:.4f}" for signal in result.signals], _mark(sweep, result)


def _mark(sweep: SweepResult, result: SettingResult) -> str:
    marks = ["chosen"] if result is sweep.chosen else []
    marks += ["config's own"] if result.setting == sweep.own else []
    return ", ".join(marks)
