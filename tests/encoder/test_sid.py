"""The SID codec: exact for all ids that fit int64, refused beyond, and described in file metadata."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sidestack.encoder.sid.columns import (
    METADATA_KEY,
    content_columns,
    event_columns,
    read_sid_spec,
    require_spec,
    with_sid_metadata,
)
from sidestack.encoder.sid.lookup import DigitLookup, _digit_lookup, unpack_ids
from sidestack.encoder.sid.packing import Packing, max_digits, pack_digits
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.config import VERSION
from sidestack.infra.errors import SpecError

PACKINGS: tuple[Packing, ...] = ("mixed_radix", "paper_eq5")


def a_spec(**changes: object) -> SidSpec:
    values = {"quantizer": "structured", "levels": 3, "digits": 15, "depth": 5, "groups": 3}
    return SidSpec.model_validate({**values, "fingerprint": "ab" * 32, **changes})


def reference_id(digits: list[int], radix: int, packing: Packing) -> int:
    """Return the id, computed with Python's unbounded integers."""
    if packing == "paper_eq5":
        return sum(radix**k * g for k, g in enumerate(digits, start=1))
    value = 0
    for digit in digits:
        value = value * radix + digit
    return value


@pytest.mark.parametrize(("levels", "digits"), [(2, 63), (3, 39), (4, 31), (8, 21), (16, 15), (64, 10), (256, 7)])
def test_max_digits_is_what_int64_holds(levels: int, digits: int) -> None:
    assert max_digits(levels) == digits
    assert levels**digits <= 2**63 < levels ** (digits + 1)


@st.composite
def codes(draw: st.DrawFn) -> tuple[int, Packing, list[list[int]]]:
    """Draw any (radix, number of digits) that fits int64, and rows of digits that include the extremes."""
    packing = draw(st.sampled_from(PACKINGS))
    radix = draw(st.one_of(st.integers(2, 16), st.integers(2, 2**31)))
    num_digits = draw(st.integers(1, max_digits(radix, packing)))
    row = st.lists(st.integers(0, radix - 1), min_size=num_digits, max_size=num_digits)
    rows = draw(st.lists(row, min_size=1, max_size=4))
    return radix, packing, [*rows, [0] * num_digits, [radix - 1] * num_digits]


@settings(max_examples=300)
@given(codes())
def test_pack_then_unpack_is_the_identity(code: tuple[int, Packing, list[list[int]]]) -> None:
    radix, packing, rows = code
    ids_N = pack_digits(torch.tensor(rows), radix, packing)
    assert ids_N.tolist() == [reference_id(row, radix, packing) for row in rows]
    assert unpack_ids(ids_N, radix, len(rows[0]), packing).tolist() == rows


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("levels", [*range(2, 65), 255, 256, 1000])
def test_every_digit_count_of_common_levels_round_trips(levels: int, packing: Packing) -> None:
    for num_digits in range(1, max_digits(levels, packing) + 1):
        generator = torch.Generator().manual_seed(num_digits)
        digits_ND = torch.randint(levels, (8, num_digits), generator=generator)
        digits_ND[0], digits_ND[1] = 0, levels - 1
        ids_N = pack_digits(digits_ND, levels, packing)
        assert torch.equal(unpack_ids(ids_N, levels, num_digits, packing), digits_ND)
    with pytest.raises(SpecError, match="one int64 column holds"):
        pack_digits(torch.zeros(1, num_digits + 1, dtype=torch.int64), levels, packing)
    with pytest.raises(SpecError, match="one int64 column holds"):
        unpack_ids(torch.zeros(1, dtype=torch.int64), levels, num_digits + 1, packing)


@settings(max_examples=100)
@given(
    levels=st.integers(2, 12),
    lines=st.integers(1, 3),
    digits=st.integers(1, 90),
    packing=st.sampled_from(PACKINGS),
    data=st.data(),
)
def test_chunked_ids_round_trip_and_can_be_cut_to_prefixes(
    levels: int, lines: int, digits: int, packing: Packing, data: st.DataObject
) -> None:
    spec = a_spec(levels=levels, lines=lines, digits=digits, depth=digits, groups=1, packing=packing)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    digits_ND = torch.randint(levels * lines, (5, digits), generator=generator)
    ids_NC = spec.pack(digits_ND)
    assert sum(spec.chunk_sizes) == digits
    assert ids_NC.shape == (5, len(spec.chunk_sizes))
    assert torch.equal(spec.unpack(ids_NC), digits_ND)
    length = data.draw(st.integers(1, digits))
    shorter = spec.of_prefix(length)
    assert torch.equal(spec.cut(ids_NC, length), shorter.pack(digits_ND[:, :length]))


def by_division(ids_N: torch.Tensor, radix: int, num_digits: int, packing: Packing) -> torch.Tensor:
    """Unpack ids by the formula, with a division and a remainder per digit."""
    first = 1 if packing == "paper_eq5" else 0
    powers = [radix ** (first + i) for i in range(num_digits)]
    digits = [ids_N // power % radix for power in powers]
    return torch.stack(digits if packing == "paper_eq5" else digits[::-1], dim=-1)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("radix", "num_digits"), [(2, 62), (3, 15), (3, 38), (4, 30), (64, 9), (256, 6), (9000, 3)])
def test_lookup_equals_division(radix: int, num_digits: int, packing: Packing) -> None:
    first = 1 if packing == "paper_eq5" else 0
    ids_N = torch.randint(radix**num_digits, (50_000,), generator=torch.Generator().manual_seed(0)) * radix**first
    wanted_ND = by_division(ids_N, radix, num_digits, packing)
    for dtype in (torch.int64, torch.int32, torch.float32):
        digits_ND = unpack_ids(ids_N, radix, num_digits, packing, dtype)
        assert digits_ND.dtype == dtype
        assert torch.equal(digits_ND, wanted_ND.to(dtype))
    assert torch.equal(unpack_ids(ids_N.view(5, 10_000), radix, num_digits, packing)[3, 7], wanted_ND[30_007])


@pytest.mark.parametrize("packing", PACKINGS)
def test_lookup_of_unknown_ids_returns_zeros(packing: Packing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidestack.encoder.sid.lookup._IDS_AT_A_TIME", 7)
    values_DR = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    lookup = DigitLookup(values_DR, packing)
    assert not list(lookup.state_dict())
    digits_ND = torch.randint(3, (40, 5), generator=torch.Generator().manual_seed(0))
    ids_N, known_N = pack_digits(digits_ND, 3, packing), torch.arange(40) % 3 > 0
    ids_N[::3] = torch.tensor([-1, 2**62, 0, -(2**63)] * 4)[:14]
    wanted_ND = values_DR[torch.arange(5), digits_ND] * known_N[:, None]
    assert torch.equal(lookup(ids_N, known_N), wanted_ND)
    rows_NCk = lookup._look_up(ids_N, known_N).view(40, -1)  # the path for other devices
    assert torch.equal(rows_NCk[:, :5] if packing == "paper_eq5" else rows_NCk[:, -5:], wanted_ND)


def test_lookup_built_in_inference_mode_is_usable_in_training() -> None:
    _digit_lookup.cache_clear()
    ids_N = torch.arange(27)
    with torch.inference_mode():
        unpack_ids(ids_N, 3, 3, dtype=torch.float32)
    weights = torch.ones(3, requires_grad=True)
    torch.autograd.backward((unpack_ids(ids_N, 3, 3, dtype=torch.float32) * weights).sum())
    assert weights.grad is not None
    assert weights.grad.tolist() == [27.0] * 3


def test_ids_follow_equation_5_of_the_paper() -> None:
    codeword = torch.tensor([[-1, 0, 1], [1, 1, -1]])
    ids_N = pack_digits(codeword + 1, 3, "paper_eq5")
    assert ids_N.tolist() == [3**2 * 1 + 3**3 * 2, 3 * 2 + 9 * 2]
    assert bool((ids_N % 3 == 0).all())


def test_ids_above_24_bits_are_exact() -> None:
    """Float32 sums are inexact above 24 bits: these two ids of 16 ternary digits differ only in the last digit."""
    digits_ND = torch.full((2, 16), 2)
    digits_ND[1, -1] = 1
    assert pack_digits(digits_ND, 3).tolist() == [3**16 - 1, 3**16 - 2]


def test_sorted_ids_cluster_by_prefix() -> None:
    digits_ND = torch.cartesian_prod(*[torch.arange(3)] * 4)
    assert pack_digits(digits_ND, 3).tolist() == list(range(81))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_digit_outside_its_levels_is_refused(wrong: int) -> None:
    digits_ND = torch.zeros(2, 15, dtype=torch.int64)
    digits_ND[1, 7] = wrong
    with pytest.raises(SpecError, match=rf"digit {wrong} is outside \[0, 3\)"):
        a_spec().pack(digits_ND)


def test_float_digits_and_foreign_ids_are_refused() -> None:
    with pytest.raises(SpecError, match="integer digits only"):
        a_spec().pack(torch.zeros(1, 15))
    with pytest.raises(SpecError, match="14 digits given"):
        a_spec().pack(torch.zeros(1, 14, dtype=torch.int64))
    for wrong in (-1, 3**15):
        with pytest.raises(SpecError, match=f"id {wrong} is no SID"):
            a_spec().unpack(torch.tensor([[wrong]]))
    with pytest.raises(SpecError, match="in 2 columns"):
        a_spec().unpack(torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"depth": 4}, "must be depth 4 x groups 3"),
        ({"prefix_lengths": (5, 5)}, "must rise within 1..15"),
        ({"prefix_lengths": (5, 16)}, "must rise within 1..15"),
        ({"steps": (1.0,)}, "1 steps given for 15 digits"),
        ({"prefix": 16}, "must be in 1..15"),
        ({"chunk": 1}, "must be in 0..0"),
        ({"levels": 1}, "levels 1 x lines 1 must be at least 2 values a digit"),
        ({"null": "zero"}, "Input should be 'null'"),
    ],
)
def test_an_inconsistent_spec_is_refused(changes: dict[str, object], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        a_spec(**changes)


def test_column_names_follow_the_spec() -> None:
    spec = a_spec(prefix_lengths=(5, 10, 15))
    assert list(content_columns(spec)) == ["sid"]
    assert list(event_columns(spec)) == [
        "item_sid", "item_sid_prefix_5", "item_sid_prefix_10",
        "history_sids", "history_sids_prefix_5", "history_sids_prefix_10",
    ]  # fmt: skip
    long = a_spec(digits=60, depth=60, groups=1, prefix_lengths=(20, 45))
    assert list(content_columns(long)) == ["sid", "sid_1"]
    assert list(event_columns(long))[:5] == [
        "item_sid", "item_sid_1", "item_sid_prefix_20", "item_sid_prefix_45", "item_sid_prefix_45_1",
    ]  # fmt: skip
    assert [spec.chunk for spec in content_columns(long).values()] == [0, 1]


def test_spec_is_stored_in_the_metadata_of_its_parquet_column(tmp_path: Path) -> None:
    spec = a_spec(prefix_lengths=(5,), steps=tuple(0.1 * i for i in range(1, 16)))
    columns = event_columns(spec)
    fields = [
        with_sid_metadata(pa.field(name, pa.list_(pa.int64()) if "history" in name else pa.int64()), column)
        for name, column in columns.items()
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.schema(fields).empty_table(), path)
    schema = pq.read_schema(path)
    for name, column in columns.items():
        assert read_sid_spec(schema.field(name)) == column
        require_spec(schema, name, column, path)


def rewritten(field: pa.Field, version: bytes | None, **changes: object) -> pa.Field:
    """Return the field with metadata as another version would have written it; a change to None removes the key."""
    spec = json.loads(field.metadata[METADATA_KEY]) | changes
    text = json.dumps({name: value for name, value in spec.items() if value is not None}).encode()
    return field.with_metadata({METADATA_KEY: text} | ({b"sidestack.version": version} if version else {}))


def test_spec_without_a_newer_field_loads_with_its_default(tmp_path: Path) -> None:
    field = with_sid_metadata(pa.field("sid", pa.int64()), a_spec())
    older = rewritten(field, None, bound=None, values=None, chunk=None)
    require_spec(pa.schema([older]), "sid", a_spec(), tmp_path)


def test_refusal_of_a_later_spec_names_both_versions() -> None:
    field = with_sid_metadata(pa.field("sid", pa.int64()), a_spec())
    assert field.metadata[b"sidestack.version"].decode() == VERSION
    for version, writer in ((b"7.1", "sidestack 7.1"), (None, "an unknown version of sidestack")):
        with pytest.raises(SpecError, match=rf"(?s)'sid': .*spec.axis: unknown key.*by {writer}, this is sidestack"):
            read_sid_spec(rewritten(field, version, axis=1))


def test_another_codebook_or_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    found = a_spec()
    schema = pa.schema([with_sid_metadata(pa.field("sid", pa.int64()), found), ("bare", pa.int64())])
    other = a_spec(fingerprint="cd" * 32)
    with pytest.raises(SpecError) as refused:
        require_spec(schema, "sid", other, path)
    for part in (str(path), "'sid'", found.fingerprint[:16], other.fingerprint[:16]):
        assert part in str(refused.value)
    with pytest.raises(SpecError, match="packing: 'mixed_radix', not 'paper_eq5'"):
        require_spec(schema, "sid", a_spec(packing="paper_eq5"), path)
    with pytest.raises(SpecError, match="'bare' carries no SID spec"):
        require_spec(schema, "bare", found, path)
    with pytest.raises(SpecError, match="'item_sid' is missing"):
        require_spec(schema, "item_sid", found, path)
