"""Which digits' values are in use: the measure by which dead codes and lines are found."""

import torch
from torch import Tensor, nn

from sidestack.infra.distributed import World, sum_over_ranks


class Usage(nn.Module):
    """Counts how often each value of each digit was taken, over all ranks, since the last reset.

    One batch is no measure: of 256 codes, 256 rows leave more than a third out by chance.
    """

    counts_NR: Tensor

    def __init__(self, digits: int, radix: int) -> None:
        super().__init__()
        self.register_buffer("counts_NR", torch.zeros(digits, radix, dtype=torch.int64))
        # No buffer: it is this rank's own, and empty whenever a step is over.
        self._fresh_NR: Tensor | None = None

    def note(self, digits_BN: Tensor) -> None:
        """Count a batch of this rank's digits, int64 [B, digits]."""
        counts_NR = count_values(digits_BN, self.counts_NR.shape[1])
        self._fresh_NR = counts_NR if self._fresh_NR is None else self._fresh_NR + counts_NR

    def settle(self, world: World) -> Tensor:
        """Add up over ranks what was noted since the last call; give it, int64 [digits, radix]."""
        fresh_NR = torch.zeros_like(self.counts_NR) if self._fresh_NR is None else self._fresh_NR
        self._fresh_NR = None
        fresh_NR = sum_over_ranks(world, fresh_NR)
        self.counts_NR += fresh_NR
        return fresh_NR

    def reset(self) -> None:
        """Begin to count anew."""
        self.counts_NR.zero_()


def count_values(digits_BN: Tensor, radix: int) -> Tensor:
    """Count each digit's values: int64 [digits, radix]."""
    num_digits = digits_BN.shape[1]
    rows_BN = digits_BN + torch.arange(num_digits, device=digits_BN.device) * radix
    return torch.bincount(rows_BN.flatten(), minlength=num_digits * radix).view(num_digits, radix)
