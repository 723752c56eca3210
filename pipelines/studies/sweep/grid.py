"""The settings of (levels, depth, groups) that use up a budget of bits."""

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
"""Default levels to try, if they can use up the budget."""

SLACK_BITS = 1.5
"""Maximum number of unused bits of a setting: digits of 3 levels never fill a whole number of bits."""


class Setting(Config):
    """One point of the sweep.

    In the paper's words: scalar quantization buckets, residual quantization layers, product quantization buckets.
    """

    levels: int
    depth: int
    groups: int

    @property
    def digits(self) -> int:
        """Number of digits of the SID."""
        return self.depth * self.groups

    @property
    def name(self) -> str:
        """A short name, valid for a file, a stage and a set of SIDs."""
        return f"l{self.levels}_d{self.depth}_g{self.groups}"

    def bits(self, lines: int = 1) -> float:
        """Return the bits of the SID: digits times log2 of the number of values of a digit."""
        return self.digits * math.log2(self.levels * lines)


class Budget(Config):
    """Bit budget of a sweep's settings."""

    bits: PositiveFloat
    """Maximum number of bits of a SID."""
    levels: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """Levels to try; by default those of `LEVELS` that can use up the bits."""

    def digits(self, levels: int, lines: int) -> int | None:
        """Return the number of digits that fit; None if they leave more than `SLACK_BITS` unused."""
        bits_a_digit = math.log2(levels * lines)
        digits = int(self.bits / bits_a_digit + 1e-9)
        return digits if digits * bits_a_digit >= self.bits - SLACK_BITS else None


def settings(budget: Budget, lines: int = 1) -> Iterator[Setting]:
    """Return the settings of a budget: by levels, every factorization of the digits into depth x groups.

    Each number of levels gets as many digits as fit; fewer could only increase the loss.

    Args:
        budget: bits and levels.
        lines: K, a factor in the number of values of a digit.

    Raises:
        ConfigError: an explicit number of levels cannot use up the budget to within `SLACK_BITS`.
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
    """Return the sweep parameters of a configuration's quantizer.

    Raises:
        ConfigError: the quantizer has none.
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
    """Return the quantizer of a setting: the base's, with the three changed (see `QuantizerConfig.with_knobs`).

    Raises:
        ConfigError: a parameter is out of the quantizer's range.
    """
    knobs = Knobs(setting.levels, setting.depth, setting.groups)
    return parse(type(base), base.with_knobs(knobs), f"sweep: {setting.name}")


def setting_of(knobs: Knobs) -> Setting:
    """Return the setting of a quantizer in the sweep, from its parameters."""
    return Setting(levels=knobs.levels, depth=knobs.depth, groups=knobs.groups)


def prefix_lengths(setting: Setting) -> Sequence[int]:
    """Return prefix lengths of a third, two thirds and all digits, as the default for 15; fewer for few digits."""
    thirds = (round(setting.digits * part / 3) for part in (1, 2, 3))
    return sorted({max(length, 1) for length in thirds})
