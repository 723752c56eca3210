"""The network's weights averaged over the last steps of a training (stochastic weight averaging, arXiv 1803.05407).

A step's weights depend on the batches just before it: trainings that differ in their seed alone lie as far apart as
arms do. Their mean over many steps depends on them less. Tables are left out: most of their rows stand still.
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
        """Take the weights as they are now."""
        if not self._steps:
            self._means = {name: weight.detach().clone() for name, weight in self._weights.items()}
        else:
            self._add(list(self._means.values()), [*self._weights.values()], self._steps)
        self._steps += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Put the means into the weights' place; without a step they stay as they are."""
        for name, mean in self._means.items():
            self._weights[name].copy_(mean)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to keep, the same on every rank; nothing before the first step."""
        if not self._steps:
            return {}
        return {_STEPS: torch.tensor(self._steps)} | {f"{PREFIX}{name}": mean for name, mean in self._means.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned, from among a checkpoint's tensors."""
        if _STEPS in tensors:
            self._steps = int(tensors[_STEPS])
            self._means = {
                name: tensors[f"{PREFIX}{name}"].to(weight.device, copy=True) for name, weight in self._weights.items()
            }
