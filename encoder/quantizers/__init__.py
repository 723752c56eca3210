"""The quantizers behind one contract; adding one touches its file and this union."""

from typing import Annotated

from pydantic import Field

from encoder.quantizers.contract import Quantized, Quantizer
from encoder.quantizers.fsq import FsqConfig
from encoder.quantizers.itq import ItqConfig
from encoder.quantizers.product import ProductConfig
from encoder.quantizers.residual_kmeans import ResidualKmeansConfig
from encoder.quantizers.rq_fsq import RqFsqConfig
from encoder.quantizers.rqvae import RqVaeConfig
from encoder.quantizers.structured import StructuredConfig
from encoder.quantizers.topk_kmeans import TopkKmeansConfig

QuantizerConfig = Annotated[
    StructuredConfig
    | FsqConfig
    | RqVaeConfig
    | ResidualKmeansConfig
    | ProductConfig
    | ItqConfig
    | TopkKmeansConfig
    | RqFsqConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "FsqConfig",
    "ItqConfig",
    "ProductConfig",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "ResidualKmeansConfig",
    "RqFsqConfig",
    "RqVaeConfig",
    "StructuredConfig",
    "TopkKmeansConfig",
]
