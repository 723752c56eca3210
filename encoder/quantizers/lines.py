"""Closed-form fits of a structured quantizer's lines to residuals."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Line(NamedTuple):
    """A line, or several: offset [..., M], direction [..., M], and a length along it [...]."""

    offset: Tensor
    direction: Tensor
    length: Tensor


def fitted_line(x_NM: Tensor, generator: torch.Generator | None) -> Line:
    """Return mean, unit direction, and (float64) the standard deviation along it.

    Args:
        x_NM: points.
        generator: draws a random direction; None: use the principal direction.
    """
    offset_M = x_NM.mean(0)
    centred_NM = (x_NM - offset_M).double()
    if generator is not None:
        u_M = functional.normalize(torch.randn(x_NM.shape[1], generator=generator, dtype=torch.float64), dim=0)
    else:
        u_M = torch.linalg.eigh(centred_NM.T @ centred_NM).eigenvectors[:, -1]
        u_M = u_M * u_M[u_M.abs().argmax()].sign()  # fix the sign of the axis
    spread = (centred_NM @ u_M.to(x_NM.device)).std(correction=min(len(x_NM) - 1, 1))  # of a single point: 0
    return Line(offset_M, u_M.to(x_NM), spread)


def refitted_lines(x_NM: Tensor, line_N: Tensor, q_N: Tensor, lines: int) -> tuple[Tensor, Line]:
    """Fit b and v = a * u of x ~ b + q * v by least squares, for each line over the points assigned to it.

    Args:
        x_NM: points. line_N: int64, the line of each. q_N: its value on the line, in steps. lines: their number.

    Returns:
        lines, int64 [C]: those that could be fitted; points that all have one value determine no direction.
        Their offsets b [C, M], directions v [C, M] (not of unit length) and steps |v| [C].
    """
    x_NM, q_N1 = x_NM.double(), q_N[:, None].double()
    terms = [torch.ones_like(q_N1), q_N1, q_N1.square(), x_NM, q_N1 * x_NM]
    sums = [term.new_zeros(lines, term.shape[1]).index_add_(0, line_N, term) for term in terms]
    q_K1, square_K1, x_KM, product_KM = (total / sums[0].clamp(min=1) for total in sums[1:])
    variance_K1 = square_K1 - q_K1.square()
    v_KM = (product_KM - q_K1 * x_KM) / variance_K1.clamp(min=1e-12)
    b_KM, length_K = x_KM - q_K1 * v_KM, v_KM.norm(dim=1)
    fitted_C = ((variance_K1.squeeze(1) > 1e-9) & (length_K > 1e-6)).nonzero().squeeze(1)
    return fitted_C, Line(b_KM[fitted_C], v_KM[fitted_C], length_K[fitted_C])
