"""The network's weights averaged over the last steps of a training (stochastic weight averaging, arXiv 1803.05407).

A step's weights depend on the batches just before it: trainings that differ only in their seed end up as far apart as
arms do. The mean over many steps depends on these batches less. Tables are left out: most of their rows do not change.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

PREFIX = "average."
_STEPS = f"{PREFIX}steps"


class WeightAverage:
    """The mean of some tensors over steps; all ranks have the same.

    Args of the constructor:
        weights: the tensors by name, which training changes in place.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)
        self._means: dict[str, Tensor] = {}
        self._steps = 0
        self._add = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]

    def add(self) -> None:
        """Add the current weights to the means."""
        if not self._steps:
            self._means = {name: weight.detach().clone() for name, weight in self._weights.items()}
        else:
            self._add(list(self._means.values()), [*self._weights.values()], self._steps)
        self._steps += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Overwrite the weights with their means; a no-op before the first step."""
        for name, mean in self._means.items():
            self._weights[name].copy_(mean)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors for a checkpoint, the same on every rank; empty before the first step."""
        if not self._steps:
            return {}
        return {_STEPS: torch.tensor(self._steps)} | {f"{PREFIX}{name}": mean for name, mean in self._means.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, from among a checkpoint's tensors."""
        if _STEPS in tensors:
            self._steps = int(tensors[_STEPS])
            self._means = {
                name: tensors[f"{PREFIX}{name}"].to(weight.device, copy=True) for name, weight in self._weights.items()
            }
