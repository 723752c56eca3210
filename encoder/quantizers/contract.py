"""The interface of all quantizers: digits of a latent vector, the vector they decode to, and losses.

Quantization runs in float32 whatever the surrounding precision: rounding in bfloat16 would produce another code than
the materialized one.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.config import Config
from sidestack.infra.distributed import World

Size = Annotated[int, Field(ge=1, le=4096)]
"""One of a quantizer's sizes: dimensions, layers, blocks, lines or paths."""


class Knobs(NamedTuple):
    """The settings that `pipelines.studies.sweep` varies: depth x groups digits, each with levels x lines values."""

    levels: int
    depth: int
    groups: int
    lines: int = 1


class QuantizerConfig(Config):
    """Base of the quantizers' settings: the interface for configuration, sweep and search.

    A subclass is found by its `kind`, a `Literal` of one name.
    """

    kind: str
    """The name of the quantizer."""

    not_searched: ClassVar[str] = ""
    """The reason why its digits cannot be searched through the decoder (`encoder.search`); empty: they can."""

    @abstractmethod
    def build(self) -> "Quantizer":
        """Make the quantizer, with random initial weights."""

    @property
    def knobs(self) -> Knobs | None:
        """The settings that a sweep varies; None if the quantizer has no such knobs."""
        return None

    def with_knobs(self, knobs: Knobs) -> dict[str, Any]:
        """Return the settings with other levels, depth and groups, as plain data; only for a quantizer with `knobs`.

        The latent vector keeps its width, up to rounding, so that the networks of a sweep have the same size.
        """
        raise NotImplementedError(f"{self.kind} has no knobs")


class Quantized(NamedTuple):
    """A quantized batch, as training needs it.

    Attributes:
        latent: [B, H], the bounded latent vectors, with gradient to the encoder.
        h_hat: [B, H], the vectors that the digits decode to, with gradient to the codebook. Under prefix dropout: the
            vectors that the kept digits decode to.
        digits: int64 [B, N], each in [0, radix).
        whole: [B, H], the vectors that all digits decode to; h_hat itself if none was dropped.
    """

    latent: Tensor
    h_hat: Tensor
    digits: Tensor
    whole: Tensor

    @property
    def straight_through(self) -> Tensor:
        """s = h - stop_gradient(h - h_hat), paper section 4: h_hat's value, h's gradient."""
        return self.latent - (self.latent - self.h_hat).detach()

    def codebook_loss(self) -> Tensor:
        """(stop_gradient(h) - h_hat)^2 by row, [B]: moves the codebook to the vectors.

        The mean over dimensions, not the sum, so that a weight has the same effect for any width: with
        the sum, a commitment weight of 0.25 freezes the codes of 24 dimensions soon after the start.
        Under prefix dropout the kept prefix moves, to the mean of the vectors with that prefix.
        """
        return (self.latent.detach() - self.h_hat).square().mean(-1)

    def commitment_loss(self) -> Tensor:
        """(h - stop_gradient(h_hat))^2 by row, [B], mean over dimensions: keeps vectors near their codes.

        Always near their whole codes: committed to a prefix, h would shrink onto the coarse codewords, and the
        remaining layers would have no residual.
        """
        return (self.latent - self.whole.detach()).square().mean(-1)


class Quantizer(nn.Module, ABC):
    """Base of the quantizers; shapes: h_BH [B, latent_dim], digits_BN [B, digits].

    A quantizer is one module of the fusion network and trains with it. Its parameters and buffers are the codebook that
    the SID fingerprint covers.
    """

    latent_dim: int
    digits: int
    latent_blocks: int = 1
    """Number of equally wide parts into which the latent vector is split; each is quantized independently."""
    commitment_scale: float = 1.0
    """Factor of the commitment loss. Its squares are small in the embeddings' own unit (deviations near .15), but not
    where levels are even over [-1, 1]; pulled too hard there, latents collapse onto few levels."""
    latent_spread: float | None = None
    """Standard deviation that latents should have along an axis, where levels do not follow the data; None: any."""
    depth: int = 1
    """Number of residual layers; each has digits / depth digits, which are adjacent in the code."""
    prefix_dropout: float = 0.0
    """Share of the training rows that are decoded from a random prefix of whole layers."""
    is_frozen: bool = False
    """Whether training leaves the codebook as it is; see `freeze`."""

    def freeze(self) -> None:
        """Keep every parameter and buffer as it is from now on.

        Nothing is learned by gradient or observed. The caller must then skip `start`, `revive` and `after_step`.
        """
        self.is_frozen = True
        self.requires_grad_(False)

    def forward(self, h_BH: Tensor) -> Quantized:
        """Quantize a batch for training."""
        with torch.autocast(h_BH.device.type, enabled=False):
            latent_BH = self.latent(at_least_float32(h_BH))
            with torch.no_grad():
                digits_BN = self.encode(h_BH)
                if self.training and not self.is_frozen:
                    self.observe(latent_BH, digits_BN)
            if not self.training or not self.prefix_dropout:
                h_hat_BH = self.decode(digits_BN)
                return Quantized(latent_BH, h_hat_BH, digits_BN, h_hat_BH)
            h_hat_BH = self.decode(digits_BN, self._kept_prefixes(digits_BN))
            with torch.no_grad():
                whole_BH = self.decode(digits_BN)
            return Quantized(latent_BH, h_hat_BH, digits_BN, whole_BH)

    def latent(self, h_BH: Tensor) -> Tensor:
        """Return the vectors to be rounded: h itself, unless a bound squashes it."""
        return h_BH

    @abstractmethod
    def encode(self, h_BH: Tensor) -> Tensor:
        """Return the digits of latent vectors: int64 [B, digits], depth-major."""

    @abstractmethod
    def codewords(self) -> Tensor:
        """Return the vector that each value of each digit adds to h_hat: [digits, radix, latent_dim], with gradient."""

    def decode(self, digits_BN: Tensor, kept_BN: Tensor | None = None) -> Tensor:
        """Decode digits to vectors, the sums of their codewords (Eq. 4), with gradient.

        Args:
            digits_BN: integers in [0, radix), [B, digits].
            kept_BN: bool [B, digits]; a digit that is not kept adds nothing, so a prefix is decoded by keeping only
                its digits. None keeps all.

        Returns:
            h_hat_BH: [B, latent_dim].
        """
        table_NRH = self.codewords()
        num_digits, radix, _ = table_NRH.shape
        rows_BN = digits_BN + torch.arange(num_digits, device=digits_BN.device) * radix
        weights_BN = None if kept_BN is None else kept_BN.to(table_NRH.dtype)
        return functional.embedding_bag(rows_BN, table_NRH.flatten(0, 1), mode="sum", per_sample_weights=weights_BN)

    @abstractmethod
    def sid_spec(self, fingerprint: str) -> SidSpec:
        """Describe the digits, with the fingerprint of the bundle that this quantizer is part of."""

    def start(self, h_NH: Tensor, generator: torch.Generator) -> None:
        """Set the codebook from a sample of latent vectors, the same on every rank; no-op by default."""

    @property
    def revives(self) -> bool:
        """Whether `revive` can change anything."""
        return False

    def revive(self, h_NH: Tensor, generator: torch.Generator) -> int:
        """Restart unused parts of the codebook, from a sample equal on every rank; return their number."""
        return 0

    def observe(self, latent_BH: Tensor, digits_BN: Tensor) -> None:
        """Record statistics of this rank's training batch for `after_step`."""

    def after_step(self, world: World) -> None:
        """Apply the updates that are not gradient steps, from all batches observed since the last call, on every rank.

        To be called on every rank after the optimizer's step, and so never after a step that was refused.
        """

    def _kept_prefixes(self, digits_BN: Tensor) -> Tensor:
        """Draw the digits to keep, bool [B, digits]: all, or (by `prefix_dropout`) those of the first 1..depth layers.

        Source: structured quantizer dropout, Zeghidour et al., "SoundStream", section III.D. Drawn from torch's
        global generator on the CPU, whose state is in the checkpoint.
        """
        batch, num_digits = digits_BN.shape
        dropped_B = torch.rand(batch) < self.prefix_dropout
        layers_B = torch.randint(1, self.depth + 1, (batch,)).where(dropped_B, self.depth)
        layer_N = torch.arange(num_digits) // (num_digits // self.depth)
        return (layer_N < layers_B[:, None]).to(digits_BN.device)


def at_least_float32(h_BH: Tensor) -> Tensor:
    """Convert half precisions to float32; leave float32 and float64 as they are."""
    return h_BH.to(torch.promote_types(h_BH.dtype, torch.float32))
