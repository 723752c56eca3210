"""SIDE against a slow, readable reference, and against the codec."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.quantizers import StructuredConfig
from encoder.sid import SidSpec, max_digits
from ranker.config import ArmConfig
from ranker.features import arm_features
from ranker.side import Side, SidUnpack
from tests.ranker.dataset import SID, SPEC


def spec_of(levels: int, digits: int, packing: str = "mixed_radix", steps: tuple[float, ...] = ()) -> SidSpec:
    return SidSpec(
        quantizer="test", levels=levels, digits=digits, depth=digits, groups=1, packing=packing, steps=steps,
        fingerprint="00",
    )  # fmt: skip


def slow_unpack(sid: int, levels: int, digits: int) -> list[float]:
    """Give the centred digits of one id, the first the most significant: the notes' formula, as written."""
    return [float(sid // levels ** (digits - 1 - i) % levels) - (levels - 1) / 2 for i in range(digits)]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 70), st.integers(1, 63), st.data())
def test_unpacks_like_the_readable_reference(levels: int, digits: int, data: st.DataObject) -> None:
    digits = min(digits, max_digits(levels))
    ids = data.draw(st.lists(st.integers(0, levels**digits - 1), min_size=1, max_size=5))
    sids_NC = torch.tensor(ids).unsqueeze(1)
    found = SidUnpack(spec_of(levels, digits), scale_steps=True)(sids_NC, torch.ones(len(ids), dtype=torch.bool))
    assert found.dtype == torch.float32
    assert found.tolist() == [slow_unpack(sid, levels, digits) for sid in ids]


@pytest.mark.parametrize("packing", ["mixed_radix", "paper_eq5"])
@pytest.mark.parametrize(("levels", "digits"), [(3, 15), (4, 45), (64, 12), (2, 70)])
def test_agrees_with_the_codec_also_over_several_columns(packing: str, levels: int, digits: int) -> None:
    spec = spec_of(levels, digits, packing)
    digits_ND = torch.randint(0, levels, (50, digits), generator=torch.Generator().manual_seed(0))
    sids_NC = spec.pack(digits_ND)
    h_Nt = SidUnpack(spec, scale_steps=True)(sids_NC, torch.ones(50, dtype=torch.bool))
    torch.testing.assert_close(h_Nt, spec.unpack(sids_NC).float() - spec.centre)


def test_multiplies_by_the_recorded_steps_over_their_mean_when_asked() -> None:
    spec = spec_of(3, 3, steps=(8.0, 4.0, 0.0))
    sids_NC, known_N = spec.pack(torch.tensor([[0, 1, 2], [2, 2, 2]])), torch.ones(2, dtype=torch.bool)
    assert SidUnpack(spec, scale_steps=True)(sids_NC, known_N).tolist() == [[-2.0, 0.0, 0.0], [2.0, 1.0, 0.0]]
    assert SidUnpack(spec, scale_steps=False)(sids_NC, known_N).tolist() == [[-1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("bound", ["clamp", "tanh", "ifsq"])
def test_unpacks_what_the_encoder_decodes_up_to_its_directions(bound: str) -> None:
    quantizer = StructuredConfig(levels=8, groups=2, depth=2, group_dim=3, bound=bound).build()
    quantizer.start(torch.randn(500, 6, generator=torch.Generator().manual_seed(0)), torch.Generator())
    spec, book = quantizer.sid_spec("00"), quantizer.codebook()
    digits_ND = torch.randint(0, 8, (20, 4), generator=torch.Generator().manual_seed(1))
    h_N4 = SidUnpack(spec, scale_steps=True)(spec.pack(digits_ND), torch.ones(20, dtype=torch.bool))
    mean_step = torch.tensor(spec.steps).mean()
    parts_N22M = (h_N4 * mean_step).view(20, 2, 2, 1) * book.u.squeeze(2) + book.b.squeeze(2)
    torch.testing.assert_close(parts_N22M.sum(1).flatten(1), quantizer.decode(digits_ND).detach())


def test_a_null_sid_gives_zeros_and_id_0_does_not() -> None:
    side = Side(spec_of(3, 4), scale_steps=True, dim=8)
    torch.nn.init.ones_(side.omega)
    e_Nd = side(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([True, False]))
    assert e_Nd[0].tolist() == [-4.0] * 8
    assert e_Nd[1].tolist() == [0.0] * 8


def test_many_ids_of_which_some_are_null() -> None:
    """More than are unpacked at a time, nulls holding what the columns' nulls hold."""
    spec = spec_of(3, 15)
    ids_N = torch.randint(3**15, (40_000,), generator=torch.Generator().manual_seed(0))
    known_N = torch.arange(40_000) % 7 > 0
    h_Nt = SidUnpack(spec, scale_steps=True)(torch.where(known_N, ids_N, -1)[:, None], known_N)
    rows = [0, 1, 16_383, 16_384, 39_999]
    wanted = [slow_unpack(int(ids_N[i]), 3, 15) if known_N[i] else [0.0] * 15 for i in rows]
    assert h_Nt[rows].tolist() == wanted
    assert bool((h_Nt[~known_N] == 0).all())


def test_owns_omega_and_nothing_else() -> None:
    side = Side(spec_of(3, 15), scale_steps=True, dim=32)
    assert {name: tuple(value.shape) for name, value in side.state_dict().items()} == {"omega": (15, 32)}
    features = arm_features(SPEC, ArmConfig(item="side", history="side"), SID)
    assert not any(feature.is_sid for feature in (*features.bags, *features.sequences))
