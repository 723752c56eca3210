"""The quantizers behind one contract. A new one is its file and an entry here, or a package that names it."""

import functools
from collections.abc import Mapping
from typing import Annotated

from encoder.quantizers.contract import Quantized, Quantizer, QuantizerConfig
from encoder.quantizers.fsq import FsqConfig
from encoder.quantizers.itq import ItqConfig
from encoder.quantizers.product import ProductConfig
from encoder.quantizers.residual_kmeans import ResidualKmeansConfig
from encoder.quantizers.rq_fsq import RqFsqConfig
from encoder.quantizers.rqvae import RqVaeConfig
from encoder.quantizers.structured import StructuredConfig
from encoder.quantizers.topk_kmeans import TopkKmeansConfig
from infra.kinds import ByKind, models_by_kind
from infra.plugins import QUANTIZERS

OWN: Mapping[str, type[QuantizerConfig]] = {
    "structured": StructuredConfig,
    "fsq": FsqConfig,
    "rqvae": RqVaeConfig,
    "residual_kmeans": ResidualKmeansConfig,
    "product": ProductConfig,
    "itq": ItqConfig,
    "topk_kmeans": TopkKmeansConfig,
    "rq_fsq": RqFsqConfig,
}


@functools.cache
def quantizers() -> Mapping[str, type[QuantizerConfig]]:
    """Return the quantizers' settings by kind: ours, and those of installed packages.

    Raises:
        ConfigError: an installed package names what is no quantizer's settings; see `models_by_kind`.
    """
    return models_by_kind(QUANTIZERS, QuantizerConfig, OWN)


AnyQuantizer = Annotated[QuantizerConfig, ByKind(quantizers)]
"""The settings of any quantizer, as a field of a configuration."""

__all__ = [
    "OWN",
    "AnyQuantizer",
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
    "quantizers",
]
