"""Pack digits into ids: which powers are summed, and how many digits fit in one int64."""

from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sidestack.infra.errors import SpecError

Packing = Literal["mixed_radix", "paper_eq5"]
Ids = TypeVar("Ids", Tensor, npt.NDArray[np.int64])

_INT64_VALUES = 2**63  # ids are never negative


def max_digits(radix: int, packing: Packing = "mixed_radix") -> int:
    """Return the number of digits that fit in one int64 column, by exact integer arithmetic.

    Args:
        radix: values a digit can take (levels, times lines where K > 1), at least 2.
        packing: `paper_eq5` starts at radix^1, which costs one digit.
    """
    digits, values = 0, radix if packing == "paper_eq5" else 1
    while values * radix <= _INT64_VALUES:
        digits, values = digits + 1, values * radix
    return digits


def pack_digits(digits_ND: Tensor, radix: int, packing: Packing = "mixed_radix") -> Tensor:
    """Pack the digits of each row into one int64 id.

    Args:
        digits_ND: integers in [0, radix), [N, D], the coarsest digit first.
        radix: values a digit can take.
        packing: `mixed_radix`: sum of g_i * radix^(D-1-i), the first digit most significant.
            `paper_eq5`: paper Eq. 5, sum of g_k * radix^k for k = 1..D, as printed.

    Returns:
        ids_N: int64 [N].

    Raises:
        SpecError: digits are not integers or outside [0, radix), or do not fit int64.
    """
    num_digits = digits_ND.shape[-1]
    require_fit(num_digits, radix, packing)
    if digits_ND.is_floating_point() or digits_ND.is_complex():
        raise SpecError(f"digits are {digits_ND.dtype}; ids are summed from integer digits only")
    digits_ND = digits_ND.to(torch.int64)
    if digits_ND.numel():
        low, high = (int(bound) for bound in torch.aminmax(digits_ND))
        if low < 0 or high >= radix:
            raise SpecError(f"digit {low if low < 0 else high} is outside [0, {radix})")
    weights_D = torch.tensor(_weights(num_digits, radix, packing), device=digits_ND.device)
    return (digits_ND * weights_D).sum(-1)


def split_ids(numbers_NC: Ids, ids_N: Ids, size: int, packing: Packing, apart: bool = False) -> None:
    """Split ids into numbers in [0, size) by repeated division; for arrays and tensors.

    Args:
        numbers_NC: the output, [..., C]; the most significant first, or last under `paper_eq5`.
        ids_N: [...], below size**C. size: one more than the largest number.
        packing: the digits' order. apart: add i * size to number i, so that their ranges do not overlap.
    """
    count = numbers_NC.shape[-1]
    places = range(count) if packing == "paper_eq5" else range(count - 1, -1, -1)
    rest_N = ids_N
    for place in places:
        start = place if apart else 0
        if place == places[-1]:
            numbers_NC[..., place] = rest_N + start * size
        else:
            above_N = rest_N // size
            numbers_NC[..., place] = rest_N - (above_N - start) * size
            rest_N = above_N


def require_fit(num_digits: int, radix: int, packing: Packing) -> None:
    """Check that digits fit one int64 column.

    Raises:
        SpecError: there are no digits, or more than `max_digits`.
    """
    limit = max_digits(radix, packing)
    if not 1 <= num_digits <= limit:
        raise SpecError(f"{num_digits} digits of {radix} values: one int64 column holds 1 to {limit} ({packing})")


def _weights(num_digits: int, radix: int, packing: Packing) -> list[int]:
    if packing == "paper_eq5":
        return [radix**k for k in range(1, num_digits + 1)]
    return [radix ** (num_digits - 1 - i) for i in range(num_digits)]
