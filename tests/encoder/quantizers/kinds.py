"""A small configuration of every quantizer, and vectors to quantize."""

import torch
from pydantic import TypeAdapter
from torch import Tensor

from sidestack.encoder.quantizers import AnyQuantizer, Quantizer, QuantizerConfig

KINDS: dict[str, dict[str, object]] = {
    "dpca": {"kind": "structured", "levels": 3, "groups": 2, "depth": 3, "group_dim": 4},
    "lines": {"kind": "structured", "levels": 3, "lines": 4, "groups": 2, "depth": 3, "group_dim": 4, "refits": 2},
    "lines_beam": {
        "kind": "structured", "levels": 2, "lines": 4, "groups": 1, "depth": 3, "group_dim": 8,
        "assign": "codeword", "beam": 4,
    },
    "fsq": {"kind": "fsq", "levels": 4, "digits": 8},
    "fsq_tanh": {"kind": "fsq", "levels": 5, "digits": 8, "bound": "tanh"},
    "rqvae": {"kind": "rqvae", "codes": 16, "groups": 2, "depth": 3, "group_dim": 4},
    "rqvae_ema": {"kind": "rqvae", "codes": 16, "groups": 1, "depth": 3, "group_dim": 8, "update": "ema"},
    "rqvae_beam": {"kind": "rqvae", "codes": 16, "groups": 2, "depth": 3, "group_dim": 4, "beam": 4},
    "residual_kmeans": {"kind": "residual_kmeans", "codes": 16, "depth": 3, "group_dim": 8},
    "product": {"kind": "product", "codes": 16, "groups": 4, "group_dim": 2},
    "itq": {"kind": "itq", "digits": 6, "latent_dim": 8},
    "topk_kmeans": {"kind": "topk_kmeans", "clusters": 40, "k": 5, "latent_dim": 8},
    "rq_fsq_scale": {"kind": "rq_fsq", "levels": 3, "dims": 8, "depth": 3, "bound": "tanh"},
    "rq_fsq_project": {"kind": "rq_fsq", "reading": "project", "levels": 3, "dims": 3, "depth": 3, "latent_dim": 8},
}  # fmt: skip
"""All of them take vectors of 8 dimensions."""

RESIDUAL = [name for name, settings in KINDS.items() if settings.get("depth", 1) != 1]


def made(name: str, **changes: object) -> Quantizer:
    """Build the quantizer called `name`, with the same initial weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config: QuantizerConfig = TypeAdapter(AnyQuantizer).validate_python({**KINDS[name], **changes})
        return config.build()


def vectors(rows: int = 1024, seed: int = 0) -> Tensor:
    """Return float32 [rows, 8] drawn from one correlated, uncentred distribution."""
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(99)) / 8**0.5
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)) @ mix + 0.3


def started(name: str, **changes: object) -> tuple[Quantizer, Tensor]:
    """Build the quantizer called `name`, start it on vectors, and return both."""
    quantizer, h_BH = made(name, **changes), vectors()
    quantizer.start(h_BH, torch.Generator().manual_seed(1))
    return quantizer, h_BH
