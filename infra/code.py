"""The digest of code: of the source files that decide the content of a stage or a partition."""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sidestack.infra.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds the packages: the checkout, with the links in sidestack/ resolved, or the installed package."""

DEPLOY, CLUSTERS = "infra/deploy", "infra/clusters"
"""Files for schedulers, which no stage imports: a changed schedule changes no key."""

PACKAGES = ("infra", "encoder", "ranker", "pipelines")
"""The packages that stages run."""

OURS = __name__.partition(".")[0]
"""The package that holds all packages of this repository."""

VARIABLE = "SIDESTACK_CODE"
"""The environment variable by which the driver passes a job the digest of the code in its key."""


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


def code_environment(code: Sequence[str], root: Path = ROOT) -> dict[str, str]:
    """Return the variable that holds the code of a stage's key: the digest, and the packages and modules."""
    return {VARIABLE: ":".join([code_digest(code, root), *code])}


def require_code(environment: Mapping[str, str], root: Path = ROOT) -> str:
    """Check that the code here has the digest in the job's key, and return the digest.

    Without `VARIABLE`, as in a stage run by hand, any code is accepted, and the digest is that of all packages.

    Raises:
        ConfigError: the code differs: for example an older image, or a checkout that was changed since the launch.
    """
    if VARIABLE not in environment:
        return code_digest([name for name in PACKAGES if (root / name).is_dir()], root)
    named, *code = environment[VARIABLE].split(":")
    found = code_digest(code, root)
    if named != found:
        raise ConfigError(
            f"code {found[:12]}: {', '.join(code)} in {root} is not the code that the job's key names, {named[:12]};"
            " make the image, or the checkout, anew from the driver's, or start the driver again"
        )
    return found


def python_files(code: Sequence[str], root: Path = ROOT) -> Iterator[Path]:
    """Yield the files of packages (all below them except `DEPLOY` and `CLUSTERS`) and of single modules."""
    for name in code:
        place = root / name
        files = place.rglob("*.py") if place.is_dir() else [place]
        for file in files:
            if not any(file.is_relative_to(root / folder) for folder in (DEPLOY, CLUSTERS)):
                yield file


def foreign_code(classes: Iterable[type]) -> dict[str, str]:
    """Return the digests of the packages, other than ours, that define the classes, by package name.

    The output of a stage depends on them as on our files: for example a quantizer or a source from another package.
    """
    found = {}
    for one in classes:
        name = one.__module__.partition(".")[0]
        file = getattr(sys.modules.get(name), "__file__", None)
        if name != OURS and file is not None:
            place = Path(file).parent if Path(file).name == "__init__.py" else Path(file)
            found[name] = code_digest([place.name], place.parent)
    return dict(sorted(found.items()))
