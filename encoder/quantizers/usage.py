"""Usage counts of digit values, by which dead codes and lines are found."""

import torch
from torch import Tensor, nn

from sidestack.infra.distributed import World, sum_over_ranks


class Usage(nn.Module):
    """Counts of each value of each digit, over all ranks, since the last reset.

    One batch is not enough: by chance, 256 rows miss more than a third of 256 codes.
    """

    counts_NR: Tensor

    def __init__(self, digits: int, radix: int) -> None:
        super().__init__()
        self.register_buffer("counts_NR", torch.zeros(digits, radix, dtype=torch.int64))
        # Not a buffer: it is this rank's own, and None between steps.
        self._fresh_NR: Tensor | None = None

    def count(self, digits_BN: Tensor) -> None:
        """Count a batch of this rank's digits, int64 [B, digits]."""
        counts_NR = count_values(digits_BN, self.counts_NR.shape[1])
        self._fresh_NR = counts_NR if self._fresh_NR is None else self._fresh_NR + counts_NR

    def update(self, world: World) -> Tensor:
        """Sum over ranks the counts since the last call, add them, and return them: int64 [digits, radix]."""
        fresh_NR = torch.zeros_like(self.counts_NR) if self._fresh_NR is None else self._fresh_NR
        self._fresh_NR = None
        fresh_NR = sum_over_ranks(world, fresh_NR)
        self.counts_NR += fresh_NR
        return fresh_NR

    def reset(self) -> None:
        """Reset the counts."""
        self.counts_NR.zero_()


def count_values(digits_BN: Tensor, radix: int) -> Tensor:
    """Count each digit's values: int64 [digits, radix]."""
    num_digits = digits_BN.shape[1]
    rows_BN = digits_BN + torch.arange(num_digits, device=digits_BN.device) * radix
    return torch.bincount(rows_BN.flatten(), minlength=num_digits * radix).view(num_digits, radix)
