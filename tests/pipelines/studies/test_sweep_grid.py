"""The settings that a sweep tries, and their quantizers."""

import math
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.quantizers import FsqConfig, StructuredConfig
from sidestack.infra.config import parse
from sidestack.infra.errors import ConfigError
from sidestack.pipelines.studies.sweep.grid import (
    SLACK_BITS,
    Budget,
    Setting,
    knobs_of,
    prefix_lengths,
    quantizer_of,
    setting_of,
    settings,
)


def found(bits: float, *levels: int, lines: int = 1) -> list[Setting]:
    return list(settings(Budget(bits=bits, levels=levels), lines))


def test_fifteen_ternary_digits_are_split_in_every_way() -> None:
    assert [(s.levels, s.depth, s.groups) for s in found(24, 3)] == [(3, 1, 15), (3, 3, 5), (3, 5, 3), (3, 15, 1)]
    assert [s.name for s in found(24, 64)] == ["l64_d1_g4", "l64_d2_g2", "l64_d4_g1"]


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 4))
def test_settings_match_a_brute_force_search(bits: int, levels: int, lines: int) -> None:
    each = math.log2(levels * lines)
    fitting = [
        (depth, groups) for depth, groups in product(range(1, 41), repeat=2) if depth * groups * each <= bits + 1e-6
    ]
    most = max((depth * groups for depth, groups in fitting), default=0)
    if most * each < bits - SLACK_BITS - 1e-6:
        with pytest.raises(ConfigError, match=f"{levels} levels"):
            found(bits, levels, lines=lines)
    elif abs(most * each - (bits - SLACK_BITS)) > 1e-6:  # exactly at the limit, rounding decides
        expected = sorted((depth, groups) for depth, groups in fitting if depth * groups == most)
        assert sorted((s.depth, s.groups) for s in found(bits, levels, lines=lines)) == expected


def test_levels_that_cannot_spend_the_budget_are_refused() -> None:
    with pytest.raises(ConfigError, match="sweep: 7 levels: their digits leave more than 1.5 of 24 bits unused"):
        found(24, 7)


def test_default_levels_that_do_not_fit_are_left_out() -> None:
    assert {setting.levels for setting in found(24)} == {2, 3, 4, 8, 16, 64}
    assert {setting.levels for setting in found(32)} == {2, 3, 4, 16}


@pytest.mark.parametrize(("values", "rule"), [({"levels": [3, 1]}, "levels.1"), ({"bits": 0}, "bits")])
def test_invalid_budget_is_refused(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=f"sweep.{rule}: "):
        parse(Budget, {"bits": 24} | values, "sweep")


def test_lines_count_as_values_of_a_digit() -> None:
    (first, *_) = found(24, 4, lines=4)
    assert first.digits == 6 and first.bits(4) == pytest.approx(24.0)


def test_base_quantizer_is_unchanged_by_its_own_setting() -> None:
    base = StructuredConfig(levels=3, groups=3, depth=5, group_dim=8)
    assert quantizer_of(base, setting_of(base.knobs)) == base


@given(st.integers(1, 24), st.integers(1, 24))
def test_latent_width_and_all_other_settings_are_kept(depth: int, groups: int) -> None:
    base = StructuredConfig(levels=3, groups=3, depth=5, group_dim=8, assign="codeword", bound="tanh", lines=2)
    made = quantizer_of(base, Setting(levels=4, depth=depth, groups=groups))
    assert (made.levels, made.depth, made.groups) == (4, depth, groups)
    assert 24 <= made.groups * made.group_dim < 24 + groups
    knobs = {"levels", "depth", "groups", "group_dim"}
    assert made.model_dump(exclude=knobs) == base.model_dump(exclude=knobs)


def test_knob_out_of_range_is_refused_by_the_quantizers_rule() -> None:
    with pytest.raises(ConfigError, match=r"sweep: l257_d1_g3.levels: .*256 \(value: 257\)"):
        quantizer_of(StructuredConfig(), Setting(levels=257, depth=1, groups=3))


def test_quantizer_without_the_knobs_is_refused() -> None:
    with pytest.raises(ConfigError, match="encoder.quantizer.kind='fsq': has no levels, .* take structured$"):
        knobs_of(EncoderConfig(quantizer=FsqConfig()))


@pytest.mark.parametrize(("digits", "expected"), [(15, [5, 10, 15]), (4, [1, 3, 4]), (2, [1, 2]), (1, [1])])
def test_prefixes_are_thirds(digits: int, expected: list[int]) -> None:
    assert prefix_lengths(Setting(levels=3, depth=digits, groups=1)) == expected
