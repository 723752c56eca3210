"""SIDE, compared with a slow, readable reference and with the codec."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestack.encoder.quantizers import StructuredConfig
from sidestack.encoder.quantizers.rqvae import RqVaeConfig
from sidestack.encoder.sid.packing import Packing, max_digits
from sidestack.encoder.sid.spec import Bound, SidSpec
from sidestack.infra.errors import SpecError
from sidestack.ranker.config import ModelConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.content import HistoryContent
from sidestack.ranker.contents.side import CodewordUnpack, SidUnpack
from sidestack.ranker.features import arm_features
from tests.ranker.dataset import SIDS, SPEC
from tests.ranker.training import config_with


def spec_of(levels: int, digits: int, packing: Packing = "mixed_radix", steps: tuple[float, ...] = ()) -> SidSpec:
    return SidSpec(
        quantizer="test", levels=levels, digits=digits, depth=digits, groups=1, packing=packing, steps=steps,
        fingerprint="00",
    )  # fmt: skip


def slow_unpack(sid: int, levels: int, digits: int) -> list[float]:
    """Return the centred digits of one id, the most significant first, by the formula of the notes."""
    return [float(sid // levels ** (digits - 1 - i) % levels) - (levels - 1) / 2 for i in range(digits)]


@settings(max_examples=60)
@given(st.integers(2, 70), st.integers(1, 63), st.data())
def test_unpacked_digits_match_the_slow_reference(levels: int, digits: int, data: st.DataObject) -> None:
    digits = min(digits, max_digits(levels))
    ids = data.draw(st.lists(st.integers(0, levels**digits - 1), min_size=1, max_size=5))
    sids_NC = torch.tensor(ids).unsqueeze(1)
    found = SidUnpack(spec_of(levels, digits), scale_steps=True)(sids_NC, torch.ones(len(ids), dtype=torch.bool))
    assert found.dtype == torch.float32
    assert found.tolist() == [slow_unpack(sid, levels, digits) for sid in ids]


@pytest.mark.parametrize("packing", ["mixed_radix", "paper_eq5"])
@pytest.mark.parametrize(("levels", "digits"), [(3, 15), (4, 45), (64, 12), (2, 70)])
def test_unpacked_digits_match_the_codec_over_one_or_several_columns(
    packing: Packing, levels: int, digits: int
) -> None:
    spec = spec_of(levels, digits, packing)
    digits_ND = torch.randint(0, levels, (50, digits), generator=torch.Generator().manual_seed(0))
    sids_NC = spec.pack(digits_ND)
    h_Nt = SidUnpack(spec, scale_steps=True)(sids_NC, torch.ones(50, dtype=torch.bool))
    torch.testing.assert_close(h_Nt, spec.unpack(sids_NC).float() - spec.centre)


def test_digits_are_scaled_by_the_steps_over_their_mean_when_configured() -> None:
    spec = spec_of(3, 3, steps=(8.0, 4.0, 0.0))
    sids_NC, known_N = spec.pack(torch.tensor([[0, 1, 2], [2, 2, 2]])), torch.ones(2, dtype=torch.bool)
    assert SidUnpack(spec, scale_steps=True)(sids_NC, known_N).tolist() == [[-2.0, 0.0, 0.0], [2.0, 1.0, 0.0]]
    assert SidUnpack(spec, scale_steps=False)(sids_NC, known_N).tolist() == [[-1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("bound", ["clamp", "tanh", "ifsq"])
def test_unpacked_digits_match_the_decoder_up_to_its_directions(bound: Bound) -> None:
    quantizer = StructuredConfig(levels=8, groups=2, depth=2, group_dim=3, bound=bound).build()
    quantizer.start(torch.randn(500, 6, generator=torch.Generator().manual_seed(0)), torch.Generator())
    spec, book = quantizer.sid_spec("00"), quantizer.codebook()
    digits_ND = torch.randint(0, 8, (20, 4), generator=torch.Generator().manual_seed(1))
    h_N4 = SidUnpack(spec, scale_steps=True)(spec.pack(digits_ND), torch.ones(20, dtype=torch.bool))
    mean_step = torch.tensor(spec.steps).mean()
    parts_N22M = (h_N4 * mean_step).view(20, 2, 2, 1) * book.u.squeeze(2) + book.b.squeeze(2)
    torch.testing.assert_close(parts_N22M.sum(1).flatten(1), quantizer.decode(digits_ND).detach())


def test_a_null_sid_gives_zeros_and_id_0_does_not() -> None:
    h_Nt = SidUnpack(spec_of(3, 4), scale_steps=True)(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([True, False]))
    assert h_Nt.tolist() == [[-1.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("quantizer", [
    StructuredConfig(levels=3, lines=5, groups=2, depth=2, group_dim=3),
    RqVaeConfig(codes=16, depth=3, groups=1, group_dim=4),
])  # fmt: skip
def test_codewords_give_the_latent_vector_that_the_encoder_decodes(quantizer: StructuredConfig | RqVaeConfig) -> None:
    built = quantizer.build()
    built.start(torch.randn(500, built.latent_dim, generator=torch.Generator().manual_seed(0)), torch.Generator())
    spec, codewords_DRH = built.sid_spec("00"), built.codewords().detach()
    digits_ND = torch.randint(0, spec.radix, (20, spec.digits), generator=torch.Generator().manual_seed(1))
    known_N = torch.arange(20) != 3
    unpack = CodewordUnpack(spec, codewords_DRH)
    h_NH = unpack(spec.pack(digits_ND), known_N)
    length = codewords_DRH.square().sum(-1).mean(-1).sqrt().mean()
    torch.testing.assert_close(h_NH[known_N] * length, built.decode(digits_ND).detach()[known_N])
    assert h_NH[3].tolist() == [0.0] * built.latent_dim
    assert not list(unpack.parameters()) and not unpack.state_dict()


def test_more_values_than_a_lookup_holds_are_refused() -> None:
    spec = SidSpec(quantizer="test", levels=1, lines=2**14, digits=2, depth=2, groups=1, fingerprint="00")
    with pytest.raises(SpecError, match="16384 values a digit; it unpacks up to 8192"):
        CodewordUnpack(spec, torch.zeros(2, 2**14, 4))


def test_null_ids_among_many_give_zeros() -> None:
    """There are more ids than are unpacked at a time; null ids hold -1."""
    spec = spec_of(3, 15)
    ids_N = torch.randint(3**15, (40_000,), generator=torch.Generator().manual_seed(0))
    known_N = torch.arange(40_000) % 7 > 0
    h_Nt = SidUnpack(spec, scale_steps=True)(torch.where(known_N, ids_N, -1)[:, None], known_N)
    rows = [0, 1, 16_383, 16_384, 39_999]
    wanted = [slow_unpack(int(ids_N[i]), 3, 15) if known_N[i] else [0.0] * 15 for i in rows]
    assert h_Nt[rows].tolist() == wanted
    assert bool((h_Nt[~known_N] == 0).all())


def test_side_has_no_weights_but_omega() -> None:
    features = arm_features(SPEC, config_with({"item": "side", "history": "side"}), SIDS)
    content = HistoryContent(features.history, ModelConfig(embedding_dim=32), ModelConstants())
    assert {name: tuple(value.shape) for name, value in content.state_dict().items()} == {"omega": (6, 32)}
    assert not any(feature.is_sid for feature in (*features.bags, *features.sequences))
