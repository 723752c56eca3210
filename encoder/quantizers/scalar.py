"""The scalar quantizer that the structured ones use: L levels on a line, and the borders of their cells.

Level l has the value q_l = l - (L-1)/2. The bound decides the treatment of values beyond the outermost levels: `clamp`
takes the nearest level; `tanh` (FSQ) and `ifsq` (2*sigmoid(1.6 x) - 1) squash the line first. Squashing makes the inner
cells uneven, so their values must be the cells' centroids.

Error on N(0, 1), each with its best step (`normal_mse`; tests/encoder/quantizers/test_scalar.py):

| L | clamp | squashed, centroids | tanh, values even on the squashed line |
|---|---|---|---|
| 3 | .1902 | .1902 | .1930 |
| 8 | .0374 | .0375 | .0646 |
| 64 | .0010 | .0007 | .0041 |

`ifsq` is tanh(0.8 x): with a free unit the two are the same quantizer here, and differ only in FSQ.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sidestack.encoder.sid.spec import Bound

_SQUASH: dict[Bound, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "ifsq": lambda x: 2 * torch.sigmoid(1.6 * x) - 1,
}
_UNSQUASH: dict[Bound, Callable[[Tensor], Tensor]] = {
    "tanh": torch.atanh,
    "ifsq": lambda y: torch.logit((y + 1) / 2) / 1.6,
}


def centred_levels(levels: int) -> Tensor:
    """Return q_l = l - (L-1)/2 for all levels, float64 [L]: {-1, 0, 1} at L=3."""
    # On the CPU, whatever the default device: the search for borders uses Python numbers.
    return torch.arange(levels, dtype=torch.float64, device="cpu") - (levels - 1) / 2


def squash(x: Tensor, bound: Bound) -> Tensor:
    """Map any real to [-1, 1] by the bound; `clamp` leaves it as it is, because rounding clamps."""
    return x if bound == "clamp" else _SQUASH[bound](x)


def uneven_values(levels: int, bound: Bound) -> tuple[float, ...]:
    """Return the levels' values in steps, where they are not q_l: under a squashing bound."""
    return () if bound == "clamp" else tuple(thresholds_and_values(levels, bound)[1].tolist())


def thresholds_and_values(levels: int, bound: Bound) -> tuple[Tensor, Tensor]:
    """Return the borders between the levels' cells and each level's value.

    Both are in units of the step, on the unsquashed line.

    Returns:
        thresholds float64 [L-1], rising; values float64 [L]: q_l for `clamp`, else the centroids
        of the cells under N(0, 1), with the line squashed in the unit of least error.
    """
    q_L = centred_levels(levels)
    middles = (q_L[1:] + q_L[:-1]) / 2
    if bound == "clamp":
        return middles, q_L
    thresholds = _best_unit(levels, bound) * _unsquashed(levels, bound)
    return thresholds, _centroids(thresholds)


def normal_mse(thresholds: Tensor, values: Tensor) -> float:
    """Return the mean squared error of a scalar quantizer on N(0, 1), in closed form."""
    mass, first, second = _normal_moments(thresholds)
    return float((second - 2 * values * first + values**2 * mass).sum())


@functools.cache
def best_step(levels: int, bound: Bound) -> float:
    """Return the step that fits N(0, 1) best: 1.224 at L=3 under `clamp`; 1 for squashing bounds."""
    if bound != "clamp":
        return 1.0
    thresholds, values = thresholds_and_values(levels, bound)
    return _least(lambda step: normal_mse(step * thresholds, step * values), 1e-3, 4.0)


def suited_spread(levels: int, bound: Bound) -> float:
    """Return the standard deviation of a normal variable, before squashing, that suits even levels over [-1, 1]."""
    if bound != "clamp":
        return 1 / _best_unit(levels, bound)
    return 2 / (levels - 1) / best_step(levels, bound)


@functools.cache
def _best_unit(levels: int, bound: Bound) -> float:
    """Return the unit of length in which squashing suits N(0, 1) best."""
    thresholds = _unsquashed(levels, bound)
    if not thresholds.any():  # L=2: the only border is 0 in any unit
        return 1.0
    return _least(lambda unit: normal_mse(unit * thresholds, _centroids(unit * thresholds)), 0.2, 4.0)


def _unsquashed(levels: int, bound: Bound) -> Tensor:
    """Return the borders of even cells on the squashed line, mapped back to the unsquashed line."""
    q_L = centred_levels(levels)
    return _UNSQUASH[bound]((q_L[1:] + q_L[:-1]) / (levels - 1))


def _centroids(thresholds: Tensor) -> Tensor:
    """Return the centroids under N(0, 1) of cells that are symmetric about 0."""
    mass, first, _ = _normal_moments(thresholds)
    lower = (len(thresholds) + 1) // 2
    # Computed below 0, where small tail masses are exact. A cell without mass gets its border towards 0.
    below = torch.where(mass[:lower] > 0, first[:lower] / mass[:lower], thresholds[:lower])
    centre = below.new_zeros(1 - len(thresholds) % 2)
    return torch.cat([below, centre, -below.flip(0)])


def _least(error: Callable[[float], float], low: float, high: float) -> float:
    """Find the minimum of a unimodal function, by ternary search."""
    for _ in range(100):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if error(left) < error(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def _normal_moments(thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return E[1], E[x] and E[x^2] of N(0, 1) over each of the cells between the thresholds."""
    far = thresholds.new_tensor([40.0])
    edges = torch.cat([-far, thresholds, far])
    density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(edges)
    mass = below.diff()
    return mass, -density.diff(), mass - (edges * density).diff()
