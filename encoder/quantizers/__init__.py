"""The quantizers behind one contract; adding one touches its file and this union."""

from typing import Annotated

from pydantic import Field

from encoder.quantizers.contract import Quantized, Quantizer
from encoder.quantizers.fsq import FsqConfig
from encoder.quantizers.structured import StructuredConfig

QuantizerConfig = Annotated[StructuredConfig | FsqConfig, Field(discriminator="kind")]

__all__ = ["FsqConfig", "Quantized", "Quantizer", "QuantizerConfig", "StructuredConfig"]
