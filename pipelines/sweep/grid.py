"""Which settings of (levels, depth, groups) spend a budget of bits."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, TypeVar

from pydantic import Field, PositiveFloat

from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.quantizers import quantizers
from sidestack.encoder.quantizers.contract import Knobs, QuantizerConfig
from sidestack.infra.config import Config, parse
from sidestack.infra.errors import ConfigError

Q = TypeVar("Q", bound=QuantizerConfig)

LEVELS = (2, 3, 4, 8, 16, 64)
"""Levels that are tried where none are named, as far as they can spend the budget."""

SLACK_BITS = 1.5
"""Bits of the budget that a setting may leave unused: digits of 3 levels never fill a whole number."""


class Setting(Config):
    """One point of the sweep.

    In the paper's words: scalar quantization buckets, residual quantization layers, product quantization buckets.
    """

    levels: int
    depth: int
    groups: int

    @property
    def digits(self) -> int:
        """Digits of the SID."""
        return self.depth * self.groups

    @property
    def name(self) -> str:
        """A short name that a file, a stage and a set of SIDs may have."""
        return f"l{self.levels}_d{self.depth}_g{self.groups}"

    def bits(self, lines: int = 1) -> float:
        """Return the bits of the SID: digits times the logarithm of what a digit can be."""
        return self.digits * math.log2(self.levels * lines)


class Budget(Config):
    """What the settings of a sweep may spend."""

    bits: PositiveFloat
    """The most bits of a SID."""
    levels: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """Levels to try; none: those of `LEVELS` that can spend the bits."""

    def digits(self, levels: int, lines: int) -> int | None:
        """Return how many digits fit; None where they leave more than `SLACK_BITS` unused."""
        bits_a_digit = math.log2(levels * lines)
        digits = int(self.bits / bits_a_digit + 1e-9)
        return digits if digits * bits_a_digit >= self.bits - SLACK_BITS else None


def settings(budget: Budget, lines: int = 1) -> Iterator[Setting]:
    """Return the settings of a budget: by levels, each with every way to part its digits into depth x groups.

    A number of levels gets as many digits as fit; fewer could only lose.

    Args:
        budget: bits and levels.
        lines: K, which multiplies the values of a digit.

    Raises:
        ConfigError: a number of levels that the budget names cannot spend it to within `SLACK_BITS`.
    """
    for levels in budget.levels or LEVELS:
        digits = budget.digits(levels, lines)
        if digits is None and budget.levels:
            raise ConfigError(
                f"sweep: {levels} levels: their digits leave more than {SLACK_BITS:g} of {budget.bits:g} bits unused"
            )
        if digits is None:
            continue
        for depth in range(1, digits + 1):
            if digits % depth == 0:
                yield Setting(levels=levels, depth=depth, groups=digits // depth)


def knobs_of(config: EncoderConfig) -> Knobs:
    """Return the knobs of a configuration's quantizer.

    Raises:
        ConfigError: it has none that a sweep turns.
    """
    knobs = config.quantizer.knobs
    if knobs is None:
        able = [kind for kind, model in quantizers().items() if model.knobs is not QuantizerConfig.knobs]
        raise ConfigError(
            f"encoder.quantizer.kind={config.quantizer.kind!r}: has no levels, depth and groups, which a sweep turns;"
            f" take {', '.join(able)}"
        )
    return knobs


def quantizer_of(base: Q, setting: Setting) -> Q:
    """Return the quantizer of a setting: the base's, with the three knobs turned (see `QuantizerConfig.turned`).

    Raises:
        ConfigError: a knob is out of the quantizer's range.
    """
    knobs = Knobs(setting.levels, setting.depth, setting.groups)
    return parse(type(base), base.turned(knobs), f"sweep: {setting.name}")


def setting_of(knobs: Knobs) -> Setting:
    """Return where a quantizer lies in the sweep, by its knobs."""
    return Setting(levels=knobs.levels, depth=knobs.depth, groups=knobs.groups)


def prefix_lengths(setting: Setting) -> Sequence[int]:
    """Return prefixes of a third, two thirds and all of the digits, as the default has of its 15; of fewer, fewer."""
    thirds = (round(setting.digits * part / 3) for part in (1, 2, 3))
    return sorted({max(length, 1) for length in thirds})
