"""The quantizers behind one contract. To add one: its file and an entry here, or an installed package that names it."""

import functools
from collections.abc import Mapping
from typing import Annotated

from sidestack.encoder.quantizers.contract import Quantized, Quantizer, QuantizerConfig
from sidestack.encoder.quantizers.fsq import FsqConfig
from sidestack.encoder.quantizers.itq import ItqConfig
from sidestack.encoder.quantizers.product import ProductConfig
from sidestack.encoder.quantizers.residual_kmeans import ResidualKmeansConfig
from sidestack.encoder.quantizers.rq_fsq import RqFsqConfig
from sidestack.encoder.quantizers.rqvae import RqVaeConfig
from sidestack.encoder.quantizers.structured import StructuredConfig
from sidestack.encoder.quantizers.topk_kmeans import TopkKmeansConfig
from sidestack.infra.kinds import ByKind, models_by_kind
from sidestack.infra.plugins import QUANTIZERS

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
    """Return the quantizers' settings classes by kind: ours, and those of installed packages.

    Raises:
        ConfigError: an installed package names something other than a quantizer's settings; see `models_by_kind`.
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
