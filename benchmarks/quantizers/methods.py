"""The methods by name: the settings of each, by number of bits, over the shared encoder configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Settings = Mapping[str, Any]
"""Dotted keys of a run's file, such as `encoder.quantizer`, and their values."""

TERNARY_DIGITS = {24: 15, 32: 20, 48: 30}
"""Bits -> the number of ternary digits that comes nearest from below: 23.8, 31.7, 47.5 bits."""
BITS = tuple(TERNARY_DIGITS)
_LATENT = 64
"""Dimensions of the latent vector where a method's digits do not determine them."""
_BEAM = 8
"""Paths kept when a residual code is encoded by beam search."""


@dataclass(frozen=True)
class EncoderMethod:
    """A quantizer of ours, trained in the fusion network by the stage `encoder.train`.

    Attributes:
        family: `structured`, `scalar` or `codebook`.
        settings: returns the overrides for a number of bits.
        side: whether its digits are levels on lines, which SIDE may unpack without the codebook.
    """

    family: str
    settings: Callable[[int], Settings]
    side: bool = False


@dataclass(frozen=True)
class FaissMethod:
    """A quantizer of faiss with 8 bits per code; `name` is one of `baselines.trained`."""

    name: str
    family: str = "faiss"


Method = EncoderMethod | FaissMethod


def _dpca(bits: int) -> Settings:
    return _quantizer("structured", levels=3, lines=1, groups=TERNARY_DIGITS[bits] // 5, depth=5, group_dim=8)


def _lines(lines: int, levels: int) -> Callable[[int], Settings]:
    """Return settings for K lines of L levels, with as many layers as bytes, in one group."""
    return lambda bits: _quantizer(
        "structured",
        levels=levels,
        lines=lines,
        groups=1,
        depth=bits // 8,
        group_dim=_LATENT,
        assign="codeword",
        beam=_BEAM,
        refits=3,
    )


def _fsq(bound: str) -> Callable[[int], Settings]:
    return lambda bits: _quantizer("fsq", levels=3, digits=TERNARY_DIGITS[bits], bound=bound)


def _lfq(bits: int) -> Settings:
    return _quantizer("fsq", levels=2, digits=bits)


def _rq_fsq(reading: str) -> Callable[[int], Settings]:
    """Return settings for ternary digits in the fewest layers after the first: 5 x 3, 10 x 2, 15 x 2."""
    dims = {24: 5, 32: 10, 48: 15}
    own = {"latent_dim": _LATENT} if reading == "project" else {}
    return lambda bits: _quantizer(
        "rq_fsq", reading=reading, levels=3, dims=dims[bits], depth=TERNARY_DIGITS[bits] // dims[bits], **own
    )


def _residual(kind: str, **settings: Any) -> Callable[[int], Settings]:
    return lambda bits: _quantizer(kind, codes=256, depth=bits // 8, group_dim=_LATENT, **settings)


def _product(bits: int) -> Settings:
    return _quantizer("product", codes=256, groups=bits // 8, group_dim=8)


def _itq(bits: int) -> Settings:
    return _quantizer("itq", digits=bits, latent_dim=max(bits, _LATENT))


def _topk_kmeans(bits: int) -> Settings:
    """Return settings for the nearest of 256 centroids, one byte each; only the nearest one is decoded."""
    return _quantizer("topk_kmeans", clusters=256, k=bits // 8, latent_dim=_LATENT)


def _quantizer(kind: str, **settings: Any) -> Settings:
    return {"encoder.quantizer": {"kind": kind, **settings}}


def _varied(settings: Callable[[int], Settings], more: Settings) -> Callable[[int], Settings]:
    """Return settings with further ones, of any section of the encoder, after them."""
    return lambda bits: {**settings(bits), **more}


_ENCODERS: dict[str, EncoderMethod] = {
    "dpca": EncoderMethod("structured", _dpca, side=True),
    "dpca_prefix": EncoderMethod("structured", _varied(_dpca, {"encoder.quantizer.prefix_dropout": 0.5}), side=True),
    "structured_128x2": EncoderMethod("structured", _lines(128, 2)),
    "structured_85x3": EncoderMethod("structured", _lines(85, 3)),
    "fsq_clamp": EncoderMethod("scalar", _fsq("clamp"), side=True),
    "fsq_tanh": EncoderMethod("scalar", _fsq("tanh"), side=True),
    "fsq_ifsq": EncoderMethod("scalar", _fsq("ifsq"), side=True),
    "lfq": EncoderMethod("scalar", _lfq, side=True),
    "rq_fsq_scale": EncoderMethod("scalar", _rq_fsq("scale"), side=True),
    "rq_fsq_project": EncoderMethod("scalar", _rq_fsq("project"), side=True),
    "itq": EncoderMethod("scalar", _itq, side=True),
    "rqvae_gradient": EncoderMethod("codebook", _residual("rqvae", update="gradient")),
    "rqvae_beam8": EncoderMethod("codebook", _residual("rqvae", update="gradient", beam=_BEAM)),
    "rqvae_ema": EncoderMethod("codebook", _residual("rqvae", update="ema")),
    "residual_kmeans": EncoderMethod("codebook", _residual("residual_kmeans")),
    "product": EncoderMethod("codebook", _product),
    "topk_kmeans": EncoderMethod("codebook", _topk_kmeans),
}
_SEARCH = {"encoder.search.rounds": 2}
_SEARCHED = ("dpca", "structured_128x2", "structured_85x3", "fsq_clamp", "rqvae_gradient")
"""Methods that are also measured with codes searched through the decoder, without retraining."""

METHODS: dict[str, Method] = {
    **_ENCODERS,
    **{
        f"{name}+search": replace(_ENCODERS[name], settings=_varied(_ENCODERS[name].settings, _SEARCH))
        for name in _SEARCHED
    },
    "faiss_pq": FaissMethod("pq"),
    "faiss_opq": FaissMethod("opq"),
    "faiss_rq_beam1": FaissMethod("rq_beam1"),
    "faiss_rq_beam5": FaissMethod("rq_beam5"),
    "faiss_rq_beam32": FaissMethod("rq_beam32"),
    "faiss_lsq": FaissMethod("lsq"),
}
