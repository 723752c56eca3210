"""Training statistics between two records: sums of losses, use of the digits, time spent waiting for data."""

import time

import torch
from torch import Tensor

from sidestack.encoder.config import TrainingConfig
from sidestack.encoder.evaluation import codebook_use
from sidestack.encoder.fusion import Losses
from sidestack.encoder.quantizers.usage import count_values
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.distributed import World, sum_over_ranks
from sidestack.infra.errors import TrainingError

_SCALARS = ("loss", "codebook", "commitment", "gradient_norm", "data_wait_share")


class Window:
    """Sums over this rank's steps since the last record, reduced over ranks only when they are recorded.

    Args:
        names: the signals. spec: of the digits. world: the process group.

    Attributes:
        steps: the number of steps added.
        waited: seconds that this rank waited for data in this window; the caller adds to it.
    """

    def __init__(self, names: tuple[str, ...], spec: SidSpec, world: World) -> None:
        self.names = names
        self.spec = spec
        self.world = world
        self._reset()

    def _reset(self) -> None:
        device = self.world.device
        self.signals_2K = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        self.scalars = torch.zeros(len(_SCALARS) - 1, dtype=torch.float64, device=device)
        self.histogram_NL = torch.zeros(self.spec.digits, self.spec.radix, dtype=torch.int64, device=device)
        self.steps = 0
        self.waited = 0.0
        self.since = time.monotonic()

    def add(self, losses: Losses, norm: Tensor) -> None:
        """Add a completed step: its losses and its gradient's norm."""
        self.signals_2K += torch.stack([losses.signal_sums, losses.present]).double()
        self.scalars += torch.stack([losses.total.detach(), losses.codebook, losses.commitment, norm]).double()
        self.histogram_NL += count_values(losses.digits, self.spec.radix)
        self.steps += 1

    def close(self, batch_size: int) -> tuple[dict[str, float], list[float]]:
        """Return the metrics over all ranks and the use of every digit (see `codebook_use`), and reset the window."""
        seconds = time.monotonic() - self.since
        share = torch.tensor([self.steps * self.waited / seconds], dtype=torch.float64, device=self.world.device)
        scalars = sum_over_ranks(self.world, torch.cat([self.scalars, share])) / (self.steps * self.world.size)
        metrics = dict(zip(_SCALARS, scalars.tolist(), strict=True))
        metrics["items_per_second"] = self.steps * batch_size / seconds
        sums, present = sum_over_ranks(self.world, self.signals_2K).tolist()
        for name, total, count in zip(self.names, sums, present, strict=True):
            metrics[f"{name}/loss"] = total / max(count, 1)
        use_N: list[float] = codebook_use(sum_over_ranks(self.world, self.histogram_NL))["use"]
        metrics["least_digit_use"] = min(use_N)
        self._reset()
        return {f"train/{name}": value for name, value in metrics.items()}, use_N

    def state(self) -> dict[str, Tensor]:
        """Return this rank's sums so far, for a checkpoint."""
        clock = torch.tensor([self.steps, self.waited, time.monotonic() - self.since], dtype=torch.float64)
        return {"signals": self.signals_2K, "scalars": self.scalars, "histogram": self.histogram_NL, "clock": clock}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load the sums from a checkpoint."""
        self.signals_2K.copy_(state["signals"])
        self.scalars.copy_(state["scalars"])
        self.histogram_NL.copy_(state["histogram"])
        steps, self.waited, seconds = state["clock"].tolist()
        self.steps, self.since = int(steps), time.monotonic() - seconds


class CollapseWatch:
    """Check of the digits' use against the threshold, by `TrainingConfig.collapse`.

    Args:
        config: the training's settings. spec: of the digits.
        after: the step of the codebook's last start; a window that began earlier is not checked.
    """

    def __init__(self, config: TrainingConfig, spec: SidSpec, after: int) -> None:
        self.config = config
        self.spec = spec
        self.after = after
        self.collapsed: set[int] = set()

    def check(self, first_step: int, step: int, use_N: list[float]) -> list[str]:
        """Check the use of the digits in the steps from `first_step` to `step`; the same on every rank.

        Returns:
            a warning for each digit that was not collapsed at the last check.

        Raises:
            TrainingError: a digit is below the threshold and `collapse` is "stop".
        """
        if self.config.collapse == "off" or first_step < self.after:
            return []
        low = {digit for digit, use in enumerate(use_N) if use < self.config.collapse_threshold}
        found = [f"encoder: step {step}: {self._named(digit, use_N[digit])}" for digit in sorted(low - self.collapsed)]
        if found and self.config.collapse == "stop":
            raise TrainingError("\n".join(found))
        self.collapsed = low
        return found

    def _named(self, digit: int, use: float) -> str:
        depth, group = divmod(digit, self.spec.groups)
        return (
            f"digit {digit} (depth {depth}, group {group}) has collapsed: its use is {use:.4f}, under"
            f" collapse_threshold={self.config.collapse_threshold:g} (0: one of {self.spec.radix} values, 1: all alike)"
        )
