"""The scalar quantizer under every structured one: L levels on a line, and how their cells end.

Level l stands for q_l = l - (L-1)/2. The bound says what happens beyond the outermost levels:
`clamp` goes to the nearest level; `tanh` (FSQ) and `ifsq` (2*sigmoid(1.6 x) - 1) squash the line
first, which makes the inner cells uneven, so that their values must be the cells' centroids.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from encoder.sid import Bound

_SQUASH: dict[Bound, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "ifsq": lambda x: 2 * torch.sigmoid(1.6 * x) - 1,
}
_UNSQUASH: dict[Bound, Callable[[Tensor], Tensor]] = {
    "tanh": torch.atanh,
    "ifsq": lambda y: torch.logit((y + 1) / 2) / 1.6,
}


def centred_levels(levels: int) -> Tensor:
    """Give q_l = l - (L-1)/2 for all levels, float64 [L]: {-1, 0, 1} at L=3."""
    return torch.arange(levels, dtype=torch.float64) - (levels - 1) / 2


def squash(x: Tensor, bound: Bound) -> Tensor:
    """Bring any real to [-1, 1] by the bound; `clamp` leaves it as it is, for rounding clamps."""
    return x if bound == "clamp" else _SQUASH[bound](x)


def thresholds_and_values(levels: int, bound: Bound) -> tuple[Tensor, Tensor]:
    """Give the borders between the levels' cells and the value each level decodes to.

    Both are in units of the step, on the unsquashed line.

    Returns:
        thresholds float64 [L-1], rising; values float64 [L]: q_l for `clamp`, else the centroids
        of the cells under N(0, 1).
    """
    q_L = centred_levels(levels)
    middles = (q_L[1:] + q_L[:-1]) / 2
    if bound == "clamp":
        return middles, q_L
    thresholds = _UNSQUASH[bound](middles / ((levels - 1) / 2))
    mass, first, _ = _normal_moments(thresholds)
    return thresholds, first / mass


def normal_mse(thresholds: Tensor, values: Tensor) -> float:
    """Give the mean squared error of a scalar quantizer on N(0, 1), in closed form."""
    mass, first, second = _normal_moments(thresholds)
    return float((second - 2 * values * first + values**2 * mass).sum())


def best_step(levels: int, bound: Bound) -> float:
    """Give the step that fits N(0, 1) best: 1.224 at L=3 under `clamp`; 1 for squashing bounds.

    Found by ternary search over the closed-form error, which has a single valley.
    """
    if bound != "clamp":
        return 1.0
    thresholds, values = thresholds_and_values(levels, bound)
    low, high = 1e-3, 4.0
    for _ in range(100):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if normal_mse(left * thresholds, left * values) < normal_mse(right * thresholds, right * values):
            high = right
        else:
            low = left
    return (low + high) / 2


def _normal_moments(thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give E[1], E[x] and E[x^2] of N(0, 1) over each of the cells that the thresholds cut."""
    far = torch.tensor([40.0], dtype=torch.float64)
    edges = torch.cat([-far, thresholds, far])
    density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(edges)
    mass = below.diff()
    return mass, -density.diff(), mass - (edges * density).diff()
