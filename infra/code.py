"""The digest of code: which source files decided what a stage, or a partition, holds."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The folder that holds the packages."""

DEPLOY, CLUSTERS = "infra/deploy", "infra/clusters"
"""Files for schedulers, which no stage imports: a schedule that changes leaves every key as it is."""


def code_digest(code: Sequence[str], root: Path = ROOT) -> str:
    """Return the SHA-256 over the names and contents of the Python files of packages and modules.

    Args:
        code: packages (all files below) and single modules, as paths from `root`.
        root: the folder that holds the packages.
    """
    total = hashlib.sha256()
    for file in sorted(python_files(code, root)):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


def python_files(code: Sequence[str], root: Path = ROOT) -> Iterator[Path]:
    """Yield the files of packages (all below but `DEPLOY` and `CLUSTERS`) and of single modules."""
    for name in code:
        place = root / name
        files = place.rglob("*.py") if place.is_dir() else [place]
        for file in files:
            if not any(file.is_relative_to(root / folder) for folder in (DEPLOY, CLUSTERS)):
                yield file
