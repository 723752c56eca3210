"""VQ-fusion: all content signals of an item into one quantized vector and back (paper section 4).

h = f(e_1(x_1), ..., e_n(x_n)) (Eq. 6) is quantized; s = h - stop_gradient(h - h_hat) is decoded,
x_hat_k = g_k(r(s)), where r mirrors f and g_k mirrors e_k. Everything acts on one row at a time
(LayerNorm, no batch statistics), so an item's code does not depend on the items beside it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoder.config import EncoderConfig, NetworkConfig
from encoder.quantizers import Quantizer
from encoder.signals import SignalBatch, SignalSpec


class Losses(NamedTuple):
    """What a batch costs.

    Attributes:
        total: scalar, the weighted sum that is minimized, per row.
        signal_sums: [K], each signal's loss summed over the rows that have it (cosine loss, or
            cross-entropy in nats). present: [K], the number of those rows.
        correct: [K], rows whose categorical was decoded right (embeddings, and in training: 0).
        codebook, commitment: scalars, mean over rows.
    """

    total: Tensor
    signal_sums: Tensor
    present: Tensor
    correct: Tensor
    codebook: Tensor
    commitment: Tensor


class Answer(NamedTuple):
    """What the decoder gives back of a batch.

    Attributes:
        embeddings: x_hat of every embedding signal, [B, dim] each.
        logits: of every categorical signal, [B, cardinality] each.
    """

    embeddings: list[Tensor]
    logits: list[Tensor]


class ResidualBlock(nn.Module):
    """x + W2 gelu(W1 layernorm(x)), of one width throughout."""

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
    """e_k of an embedding: unit length (its loss is a cosine), then a linear layer and a block."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.null_D = nn.Parameter(torch.zeros(dim))
        self.project = nn.Linear(dim, width)
        self.block = ResidualBlock(width)

    def forward(self, x_BD: Tensor, present_B: Tensor) -> Tensor:
        """Map [B, dim] to [B, width]; a missing row is replaced by a learned vector."""
        unit_BD = functional.normalize(x_BD, dim=-1)
        out_BW: Tensor = self.block(self.project(torch.where(present_B[:, None], unit_BD, self.null_D)))
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
        self.project = nn.Linear(width, dim)

    def forward(self, y_BW: Tensor) -> Tensor:
        """Map [B, hidden] to [B, dim]."""
        out_BD: Tensor = self.project(self.block(self.narrow(y_BW)))
        return out_BD


class FusionEncoder(nn.Module):
    """e_1..e_n and f: the part that decides the code."""

    def __init__(self, signals: SignalSpec, network: NetworkConfig, latent_dim: int) -> None:
        super().__init__()
        # Lists in the order of the names, not dicts by name: a signal may be called "type".
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
            nn.Linear(network.hidden, latent_dim),
        )

    def forward(self, batch: SignalBatch) -> Tensor:
        """Map signals to h, float [B, latent_dim]."""
        parts = [
            encode(batch.embeddings[name], batch.present[name])
            for name, encode in zip(self.embedding_names, self.embeddings, strict=True)
        ]
        parts += [
            encode(batch.categoricals[name], batch.present[name])
            for name, encode in zip(self.categorical_names, self.categoricals, strict=True)
        ]
        h_BH: Tensor = self.fuse(torch.cat(parts, dim=-1))
        return h_BH


class FusionDecoder(nn.Module):
    """r and g_1..g_n, the mirror of `FusionEncoder`."""

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
        self.categoricals = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, network.categorical_width), nn.Linear(network.categorical_width, number))
            for number in signals.categoricals.values()
        )

    def forward(self, s_BH: Tensor) -> Answer:
        """Map s [B, latent_dim] to what it says of every signal."""
        y_BW = self.unmix(s_BH)
        return Answer([decode(y_BW) for decode in self.embeddings], [decode(y_BW) for decode in self.categoricals])


class VQFusion(nn.Module):
    """The whole auto-encoder. `encoder` and `quantizer` decide the SID; `decoder` only trains them."""

    def __init__(self, config: EncoderConfig, signals: SignalSpec) -> None:
        super().__init__()
        self.signals = signals
        self.codebook_weight = config.training.codebook_weight
        self.commitment_weight = config.training.commitment_weight
        self.quantizer: Quantizer = config.quantizer.build()
        self.encoder = FusionEncoder(signals, config.network, self.quantizer.latent_dim)
        self.decoder = FusionDecoder(signals, config.network, self.quantizer.latent_dim)
        weights_K = torch.tensor([signals.weights[name] for name in signals.names])
        self.weights_K: Tensor
        self.register_buffer("weights_K", weights_K, persistent=False)

    def forward(self, batch: SignalBatch, rows: int) -> Losses:
        """Give the losses of a batch.

        Args:
            batch: the signals.
            rows: what sums over rows are divided by. One number on every rank, rather than this
                batch's own rows, makes the average over ranks the average over items.
        """
        quantized = self.quantizer(self.encoder(batch))
        answer = self.decoder(quantized.straight_through)
        sums_K = self.row_losses(batch, answer).sum(1)
        codebook = quantized.codebook_loss().sum() / rows
        commitment = quantized.commitment_loss().sum() / rows
        total: Tensor = (self.weights_K * sums_K).sum() / rows
        total = total + self.codebook_weight * codebook + self.commitment_weight * commitment
        present_K = torch.stack([batch.present[name].sum() for name in self.signals.names])
        correct_K = torch.zeros_like(sums_K.detach()) if self.training else self._correct(batch, answer)
        return Losses(total, sums_K.detach(), present_K, correct_K, codebook.detach(), commitment.detach())

    def digits(self, batch: SignalBatch) -> Tensor:
        """Give the SID digits of a batch: int64 [B, digits]."""
        return self.quantizer.encode(self.encoder(batch))

    def reconstruct(self, digits_BN: Tensor, kept_BN: Tensor | None = None) -> Answer:
        """Decode digits, or (see `Quantizer.decode`) those of them that are kept, to signals."""
        answer: Answer = self.decoder(self.quantizer.decode(digits_BN, kept_BN))
        return answer

    def row_losses(self, batch: SignalBatch, answer: Answer) -> Tensor:
        """Give every signal's loss of every row, [K, B]; 0 where the row does not have the signal."""
        losses = []
        for name, x_hat_BD in zip(self.signals.embeddings, answer.embeddings, strict=True):
            cosine_B = functional.cosine_similarity(x_hat_BD.float(), batch.embeddings[name], dim=-1)
            losses.append((1 - cosine_B) * batch.present[name])
        for name, logits_BC in zip(self.signals.categoricals, answer.logits, strict=True):
            entropy_B = functional.cross_entropy(logits_BC.float(), batch.categoricals[name], reduction="none")
            losses.append(entropy_B * batch.present[name])
        return torch.stack(losses)

    def _correct(self, batch: SignalBatch, answer: Answer) -> Tensor:
        """Count the rows whose categorical is the most likely one, [K]; 0 for embeddings."""
        counts = [torch.zeros((), device=self.weights_K.device) for _ in self.signals.embeddings]
        for name, logits_BC in zip(self.signals.categoricals, answer.logits, strict=True):
            right_B = logits_BC.argmax(-1) == batch.categoricals[name]
            counts.append((right_B & batch.present[name]).sum().float())
        return torch.stack(counts)
