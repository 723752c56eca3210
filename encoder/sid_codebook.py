"""The frozen codebook stored with a dataset's SID columns: the vector of each value of each digit.

Part of the contract between encoder and ranker, like `encoder.sid`: a SID with one line per layer is unpacked by its
spec alone; a SID of unordered codewords needs the codebook.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.errors import DataError, SpecError
from sidestack.infra.tensors import write_tensors

FOLDER = "codebooks"
_CODEWORDS = "codewords"
_FINGERPRINT = "fingerprint"


def write_codebook(dataset: Path, spec: SidSpec, codewords_DRH: Tensor) -> None:
    """Write the codebook of a set of SIDs.

    Args:
        dataset: the dataset's directory. spec: the whole SID's spec.
        codewords_DRH: the vector that each value of each digit adds to h_hat, [digits, radix, latent_dim].
    """
    assert codewords_DRH.shape[:2] == (spec.digits, spec.radix)
    path = _file(dataset, spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors({_CODEWORDS: codewords_DRH.float()}, path, {_FINGERPRINT: spec.fingerprint})


def read_codebook(dataset: Path, spec: SidSpec) -> Tensor:
    """Read the codebook of a set of SIDs: float32 [digits, radix, latent_dim].

    Raises:
        DataError: there is no codebook, or it cannot be read. SpecError: it is another encoder's.
    """
    path = _file(dataset, spec)
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(_FINGERPRINT, "none")
            codewords_DRH: Tensor = file.get_tensor(_CODEWORDS)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as the codebook of the SIDs {spec.name!r}: {error}") from error
    if found != spec.fingerprint:
        raise SpecError(f"{path}: fingerprint {found[:16]}…, the SIDs {spec.name!r} have {spec.fingerprint[:16]}…")
    if codewords_DRH.shape[:2] != (spec.digits, spec.radix):
        raise SpecError(
            f"{path}: codewords {tuple(codewords_DRH.shape)} for {spec.digits} digits of {spec.radix} values"
        )
    return codewords_DRH


def _file(dataset: Path, spec: SidSpec) -> Path:
    return dataset / FOLDER / f"{spec.name}.safetensors"
