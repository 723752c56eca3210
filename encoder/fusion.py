"""VQ-fusion: all content signals of an item into one quantized vector and back (paper section 4).

h = f(e_1(x_1), ..., e_n(x_n)) (Eq. 6) is quantized; s = h - stop_gradient(h - h_hat) is decoded,
x_hat_k = g_k(r(s)), where r mirrors f and g_k mirrors e_k. Everything acts on one row at a time
(LayerNorm, no batch statistics), so an item's code does not depend on the items beside it.
"""

import itertools
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sidestack.encoder.config import EncoderConfig, NetworkConfig, SearchConfig
from sidestack.encoder.quantizers import Quantizer
from sidestack.encoder.search import refine_digits
from sidestack.encoder.signals import SignalBatch, SignalSpec


class Losses(NamedTuple):
    """The losses of a batch.

    Attributes:
        total: scalar, the weighted sum that is minimized, per row.
        signal_sums: [K], each signal's loss summed over the rows that have it (cosine loss, or
            cross-entropy in nats). present: [K], the number of those rows.
        codebook, commitment: scalars, mean over rows.
        digits: int64 [B, digits], as rounded.
    """

    total: Tensor
    signal_sums: Tensor
    present: Tensor
    codebook: Tensor
    commitment: Tensor
    digits: Tensor


class Reconstruction(NamedTuple):
    """The decoder's output for a batch.

    Attributes:
        embeddings: x_hat of every embedding signal, [B, dim] each.
        logits: of every categorical signal, [B, cardinality] each.
    """

    embeddings: list[Tensor]
    logits: list[Tensor]


class ResidualBlock(nn.Module):
    """x + W2 gelu(W1 layernorm(x)), with one width throughout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inward = nn.Linear(width, width)
        self.outward = nn.Linear(width, width)

    def forward(self, x_BW: Tensor) -> Tensor:
        """Map [B, width] to [B, width]."""
        change_BW: Tensor = self.outward(functional.gelu(self.inward(self.norm(x_BW))))
        return x_BW + change_BW


class EmbeddingEncoder(nn.Module):
    """e_k of an embedding: normalization to unit length (its loss is a cosine), a linear layer and a block."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.null_D = nn.Parameter(torch.zeros(dim))
        self.project = nn.Linear(dim, width)
        self.block = ResidualBlock(width)

    def unit(self, x_BD: Tensor, present_B: Tensor) -> Tensor:
        """Normalize rows to unit length, [B, dim]; a missing row is replaced by a learned vector."""
        # Sums and products instead of torch.where: a condition by row takes eight times as long on a CPU.
        length_B = torch.linalg.vector_norm(x_BD, dim=-1).clamp(min=1e-12).where(present_B, torch.inf)
        missing_B = (~present_B).to(x_BD.dtype)
        return torch.addcmul(x_BD / length_B[:, None], missing_B[:, None], self.null_D)

    def forward(self, unit_BD: Tensor) -> Tensor:
        """Map [B, dim] to [B, width]."""
        out_BW: Tensor = self.block(self.project(unit_BD))
        return out_BW


class CategoricalEncoder(nn.Module):
    """e_k of a categorical: an embedding table whose last row stands for a missing one."""

    def __init__(self, cardinality: int, width: int) -> None:
        super().__init__()
        self.null_id = cardinality
        self.table = nn.Embedding(cardinality + 1, width)

    def forward(self, ids_B: Tensor, present_B: Tensor) -> Tensor:
        """Map ids [B] to [B, width]."""
        out_BW: Tensor = self.table(torch.where(present_B, ids_B, self.null_id))
        return out_BW


class EmbeddingDecoder(nn.Module):
    """g_k of an embedding, the mirror of `EmbeddingEncoder`."""

    def __init__(self, hidden: int, width: int, dim: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(hidden, width)
        self.block = ResidualBlock(width)
        self.project = _zero_initialized(nn.Linear(width, dim))

    def forward(self, y_BW: Tensor) -> Tensor:
        """Map [B, hidden] to [B, dim]."""
        out_BD: Tensor = self.project(self.block(self.narrow(y_BW)))
        return out_BD


class FusionEncoder(nn.Module):
    """e_1..e_n and f, the part that decides the code, plus a linear path from the embeddings to h.

    The linear path starts as a principal component analysis (`VQFusion.start_linear`) and the others start at 0, so
    that training starts from the result of linear quantization.
    """

    def __init__(self, signals: SignalSpec, network: NetworkConfig, latent_dim: int) -> None:
        super().__init__()
        # Lists in the order of the names, not a ModuleDict: a signal may be called "type".
        self.embedding_names, self.categorical_names = tuple(signals.embeddings), tuple(signals.categoricals)
        self.embeddings = nn.ModuleList(
            EmbeddingEncoder(dim, network.embedding_width) for dim in signals.embeddings.values()
        )
        self.categoricals = nn.ModuleList(
            CategoricalEncoder(number, network.categorical_width) for number in signals.categoricals.values()
        )
        joint = len(self.embeddings) * network.embedding_width + len(self.categoricals) * network.categorical_width
        self.fuse = nn.Sequential(
            nn.Linear(joint, network.hidden),
            *(ResidualBlock(network.hidden) for _ in range(network.blocks)),
            nn.LayerNorm(network.hidden),
            _zero_initialized(nn.Linear(network.hidden, latent_dim)),
        )
        self.linear = nn.Linear(sum(signals.embeddings.values()), latent_dim) if signals.embeddings else None

    def units(self, batch: SignalBatch) -> list[Tensor]:
        """Return the embeddings at unit length, nulls replaced: [B, dim] each."""
        encoders = (module for module in self.embeddings if isinstance(module, EmbeddingEncoder))
        named = zip(self.embedding_names, encoders, strict=True)
        return [encode.unit(batch.embeddings[name], batch.present[name]) for name, encode in named]

    def forward(self, batch: SignalBatch) -> Tensor:
        """Map signals to h, float [B, latent_dim]."""
        units = self.units(batch)
        parts = [encode(unit_BD) for unit_BD, encode in zip(units, self.embeddings, strict=True)]
        parts += [
            encode(batch.categoricals[name], batch.present[name])
            for name, encode in zip(self.categorical_names, self.categoricals, strict=True)
        ]
        h_BH: Tensor = self.fuse(torch.cat(parts, dim=-1))
        return h_BH if self.linear is None else h_BH + self.linear(torch.cat(units, dim=-1))


class FusionDecoder(nn.Module):
    """r and g_1..g_n, the mirror of `FusionEncoder`, including its linear path."""

    def __init__(self, signals: SignalSpec, network: NetworkConfig, latent_dim: int) -> None:
        super().__init__()
        hidden = network.hidden
        self.unmix = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            *(ResidualBlock(hidden) for _ in range(network.blocks)),
            nn.LayerNorm(hidden),
        )
        self.embeddings = nn.ModuleList(
            EmbeddingDecoder(hidden, network.embedding_width, dim) for dim in signals.embeddings.values()
        )
        self.linears = nn.ModuleList(nn.Linear(latent_dim, dim) for dim in signals.embeddings.values())
        self.categoricals = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, network.categorical_width), nn.Linear(network.categorical_width, number))
            for number in signals.categoricals.values()
        )

    def forward(self, s_BH: Tensor) -> Reconstruction:
        """Reconstruct every signal from s [B, latent_dim]."""
        y_BW = self.unmix(s_BH)
        paths = zip(self.embeddings, self.linears, strict=True)
        embeddings = [decode(y_BW) + linear(s_BH) for decode, linear in paths]
        return Reconstruction(embeddings, [decode(y_BW) for decode in self.categoricals])


def _set_linear(linear: nn.Module, weight: Tensor, bias: Tensor) -> None:
    linear.load_state_dict({"weight": weight, "bias": bias})


def _zero_initialized(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class VQFusion(nn.Module):
    """The whole auto-encoder. `encoder` and `quantizer` decide the SID; so does `decoder` if codes are searched."""

    def __init__(self, config: EncoderConfig, signals: SignalSpec) -> None:
        super().__init__()
        self.signals = signals
        self.search = config.search
        self.codebook_weight = config.training.codebook_weight
        self.signal_dropout = config.training.signal_dropout
        self.quantizer: Quantizer = config.quantizer.build()
        self.commitment_weight = config.training.commitment_weight * self.quantizer.commitment_scale
        self.encoder = FusionEncoder(signals, config.network, self.quantizer.latent_dim)
        self.decoder = FusionDecoder(signals, config.network, self.quantizer.latent_dim)
        weights_K = torch.tensor([signals.weights[name] for name in signals.names])
        self.weights_K: Tensor
        self.register_buffer("weights_K", weights_K, persistent=False)

    def forward(self, batch: SignalBatch, rows: int) -> Losses:
        """Return the losses of a batch.

        Args:
            batch: the signals.
            rows: the divisor of sums over rows. With the same number on every rank, rather than this batch's own
                rows, the average over ranks is the average over items.
        """
        quantized = self.quantizer(self.encoder(self._hide_signals(batch)))
        answer = self.decoder(quantized.straight_through)
        sums_K = self.row_losses(batch, answer).sum(1)
        codebook = quantized.codebook_loss().sum() / rows
        commitment = quantized.commitment_loss().sum() / rows
        total: Tensor = (self.weights_K * sums_K).sum() / rows
        total = total + self.codebook_weight * codebook + self.commitment_weight * commitment
        present_K = torch.stack([batch.present[name].sum() for name in self.signals.names])
        return Losses(total, sums_K.detach(), present_K, codebook.detach(), commitment.detach(), quantized.digits)

    def weighted_units(self, batch: SignalBatch) -> Tensor:
        """Return all embeddings of a batch concatenated, [B, sum of dims], as `start_linear` takes them.

        Each has unit length times the square root of its weight. Half the squared distance of two such rows is then
        the weighted sum of their cosine losses.
        """
        scales = [self.signals.weights[name] ** 0.5 for name in self.signals.embeddings]
        units = zip(self.encoder.units(batch), scales, strict=True)
        return torch.cat([unit_BD * scale for unit_BD, scale in units], dim=-1)

    @torch.no_grad()
    def start_linear(self, x_ND: Tensor) -> None:
        """Set the encoder's linear path to the principal axes of a sample, and the decoder's to the inverse map.

        The axes are assigned to the quantizer's blocks in turn, so that each block gets its share of the variance. For
        a quantizer whose levels have a fixed spread, the axes are scaled to it.

        Args:
            x_ND: `weighted_units` of a sample, the same on every rank.
        """
        assert self.encoder.linear is not None, "categoricals alone have no axes"
        mean_D = x_ND.mean(0)
        axes_DH, spread_H = _principal_axes(x_ND - mean_D, self.quantizer.latent_dim)
        order_H = torch.arange(axes_DH.shape[1]).view(-1, self.quantizer.latent_blocks).T.flatten()
        axes_DH, spread_H = axes_DH[:, order_H], spread_H[order_H]
        wanted = self.quantizer.latent_spread
        scale_H = torch.ones_like(spread_H) if wanted is None else wanted / spread_H.clamp(min=1e-6)
        sizes = self.signals.embeddings
        root_D = torch.cat([mean_D.new_full((dim,), self.signals.weights[name] ** 0.5) for name, dim in sizes.items()])
        _set_linear(self.encoder.linear, (axes_DH * scale_H).T * root_D, -(mean_D @ axes_DH) * scale_H)
        back_DH, centre_D = axes_DH / scale_H / root_D[:, None], mean_D / root_D
        ends = itertools.accumulate(sizes.values())
        for linear, dim, end in zip(self.decoder.linears, sizes.values(), ends, strict=True):
            _set_linear(linear, back_DH[end - dim : end], centre_D[end - dim : end])

    def _hide_signals(self, batch: SignalBatch) -> SignalBatch:
        """Hide signals from the encoder in training: in a share of the rows, each with probability 1/2, but never all.

        The losses still cover the hidden signals, so the code learns to represent an item with missing signals. Drawn
        from torch's global generator, whose state is in checkpoints.
        """
        if not self.training or not self.signal_dropout:
            return batch
        present_KB = torch.stack([batch.present[name] for name in self.signals.names]).cpu()
        chance_KB = torch.rand(present_KB.shape) * present_KB
        kept_KB = (chance_KB > 0.5) | (chance_KB == chance_KB.amax(0))  # the one with the highest draw always stays
        whole_B = torch.rand(present_KB.shape[1]) >= self.signal_dropout
        seen_KB = (present_KB & (kept_KB | whole_B)).to(self.weights_K.device)
        return batch.with_present(dict(zip(self.signals.names, seen_KB, strict=True)))

    def digits(self, batch: SignalBatch) -> Tensor:
        """Return the SID digits of a batch, rounded and (by config) refined: int64 [B, digits]."""
        h_BH = self.encoder(batch)
        digits_BN = self.quantizer.encode(h_BH)
        if not self.search.rounds:
            return digits_BN
        return self.refine_digits(batch, h_BH, digits_BN, self.search)[0]

    def refine_digits(
        self, batch: SignalBatch, h_BH: Tensor, digits_BN: Tensor, search: SearchConfig
    ) -> tuple[Tensor, Tensor]:
        """Refine digits by the weighted loss of a row's signals; see `encoder.search.refine_digits`."""
        bounded_BH = self.quantizer.latent(h_BH)
        losses_of = partial(self._losses, batch)
        return refine_digits(self.quantizer, losses_of, bounded_BH, digits_BN, search)

    def _losses(self, batch: SignalBatch, h_hat_BCH: Tensor) -> Tensor:
        """Return the weighted loss of every row's candidates, [B, C]."""
        rows, candidates, _ = h_hat_BCH.shape
        answer = self.decoder(h_hat_BCH.flatten(0, 1))
        losses_KX = self.row_losses(batch.repeated(candidates), answer)
        return (self.weights_K @ losses_KX).view(rows, candidates)

    def reconstruct(self, digits_BN: Tensor, kept_BN: Tensor | None = None) -> Reconstruction:
        """Decode digits to signals: all of them, or those that are kept (see `Quantizer.decode`)."""
        answer: Reconstruction = self.decoder(self.quantizer.decode(digits_BN, kept_BN))
        return answer

    def row_losses(self, batch: SignalBatch, answer: Reconstruction) -> Tensor:
        """Return every signal's loss of every row, [K, B]; 0 where the row does not have the signal."""
        losses = []
        for name, x_hat_BD in zip(self.signals.embeddings, answer.embeddings, strict=True):
            cosine_B = functional.cosine_similarity(x_hat_BD.float(), batch.embeddings[name], dim=-1)
            losses.append((1 - cosine_B) * batch.present[name])
        for name, logits_BC in zip(self.signals.categoricals, answer.logits, strict=True):
            entropy_B = functional.cross_entropy(logits_BC.float(), batch.categoricals[name], reduction="none")
            losses.append(entropy_B * batch.present[name])
        return torch.stack(losses)


def _principal_axes(x_ND: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the axes of largest variance, [D, number], and the standard deviations along them; zeros beyond D."""
    covariance_DD = (x_ND.double().T @ x_ND.double()) / len(x_ND)
    variances_D, axes_DD = torch.linalg.eigh(covariance_DD)
    axes_DH = axes_DD.flip(1)[:, :number]
    axes_DH = axes_DH * axes_DH.gather(0, axes_DH.abs().argmax(0, keepdim=True)).sign()  # fix the sign
    spread_H = variances_D.flip(0)[:number].clamp(min=0).sqrt()
    missing = number - axes_DH.shape[1]
    padding = (0, missing)
    return functional.pad(axes_DH, padding).to(x_ND), functional.pad(spread_H, padding).to(x_ND)
