"""The manifest of a committed directory: what it says, and whether the directory is still what it says."""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from sidestack.infra.config import Config
from sidestack.infra.errors import CommitError
from sidestack.infra.files import (
    hash_all,
    open_regular,
    regular_files,
)
from sidestack.infra.logs import LOG
from sidestack.infra.record import HISTORY_FILE, SUMMARY_FILE
from sidestack.infra.remote import trees
from sidestack.infra.remote.urls import address, url_of
from sidestack.infra.sealed import OWN_DIGEST, sealed, unsealed

MANIFEST = "manifest.json"


OWNER = ".owner"
"""The file by which a directory that is being written is told from another of its name."""


VERSIONS = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchx", "pyarrow", "mlflow", "sidestack")


class FileEntry(Config):
    """What the manifest says of one file: digest, size, and the number of rows where it is a Parquet file."""

    sha256: str
    bytes: int
    rows: int | None = None


class Manifest(Config):
    """The description of a committed directory, and by its presence the mark that it is whole.

    `key` names the work (config, inputs, code), `inputs` the digests of the manifests it was made from, `facts`
    what the stage adds (the resolved config's digest, world size, a codebook's fingerprint).

    On disk it holds a digest of itself (`infra.sealed`), so that an edited key, stage or fact is found. Manifests of
    format `sidestack/1` hold none; they are read, and the first that a process reads is said on stderr.
    """

    format: Literal["sidestack/1", "sidestack/2"] = "sidestack/2"
    stage: str
    key: str = ""
    created: str
    inputs: dict[str, str] = {}
    facts: dict[str, Any] = {}
    versions: dict[str, str] = {}
    files: dict[str, FileEntry]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and contents of the files, the stage's record aside.

        The record (history and summary) tells how long things took; without it, the same work made twice has the same
        digest, and what comes after it the same key.
        """
        data = {name: entry.sha256 for name, entry in self.files.items() if name not in (HISTORY_FILE, SUMMARY_FILE)}
        lines = [f"{name} {sha256}" for name, sha256 in sorted(data.items())]
        return hashlib.sha256("\n".join([self.stage, *lines]).encode()).hexdigest()

    @classmethod
    def of_json(cls, content: bytes, file: str) -> "Manifest":
        """Parse the content of a manifest's file.

        Raises:
            CommitError: it is none of ours, or was altered.
        """
        values, has_digest = unsealed(content, file)
        try:
            manifest = cls.model_validate(values)
        except ValidationError as error:
            raise CommitError(f"{file}: not a sidestack manifest ({error.error_count()} faults)") from error
        if has_digest != (manifest.format != _WITHOUT_DIGEST):
            raise CommitError(f"{file}: format {manifest.format!r} does not go with its {OWN_DIGEST}: it was altered")
        if not has_digest:
            _say_without_digest(file)
        return manifest


_WITHOUT_DIGEST = "sidestack/1"


_said_without_digest: list[str] = []


def _say_without_digest(file: str) -> None:
    if not _said_without_digest:
        _said_without_digest.append(file)
        LOG.warning(
            f"{file}: was committed by an earlier version, whose manifests hold no digest of themselves: its files are"
            " checked, an edited key or fact of it is not found; so with others of that version"
        )


def is_committed(path: Path) -> bool:
    """Whether the directory carries a manifest."""
    if url_of(path) is not None:
        return trees.read_manifest_bytes(Path(path), MANIFEST) is not None
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: Path, *, stage: str | None = None, key: str | None = None) -> Manifest:
    """Read a committed directory's manifest without hashing its files.

    Args:
        path: the directory. stage, key: what its manifest must say, where they are given.

    Raises:
        CommitError: there is no manifest, it is not one of ours or was altered, or it is of another stage or key.
    """
    found = find_manifest(path, stage=stage, key=key)
    if found is None:
        raise CommitError(f"{address(path)}: not a committed directory (no {MANIFEST})")
    return found


def find_manifest(path: Path | str, *, stage: str | None = None, key: str | None = None) -> Manifest | None:
    """Read a committed directory's manifest; None where the directory is not committed.

    Args:
        path: the directory. stage, key: see `read_manifest`.

    Raises:
        CommitError: the manifest is not one of ours or was altered, or it is of another stage or key.
    """
    file = f"{address(path)}/{MANIFEST}"
    content = _manifest_bytes(path, file)
    if content is None:
        return None
    found = Manifest.of_json(content, file)
    for what, is_there, wanted in (("stage", found.stage, stage), ("key", found.key, key)):
        if wanted is not None and is_there != wanted:
            raise CommitError(
                f"{address(path)}: is of {what} {is_there[:24]!r}, not of {wanted[:24]!r}: another one's output"
            )
    return found


def _manifest_bytes(path: Path | str, file: str) -> bytes | None:
    if url_of(path) is not None:
        return trees.read_manifest_bytes(Path(path), MANIFEST)
    try:
        with open_regular(file) as opened:
            return opened.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CommitError(f"{file}: cannot be read: {error.strerror}") from error


def verify(path: Path, *, stage: str | None = None, key: str | None = None) -> Manifest:
    """Read the manifest and check every file's size and SHA-256 against it; of a URL, those of this machine's copy,
    which is fetched where there is none.

    Args:
        path: the directory. stage, key: see `read_manifest`.

    Raises:
        CommitError: see `read_manifest`; a file is missing, of another size, altered, not named in the manifest, not a
            regular file, or cannot be read.
    """
    path = Path(path)
    manifest = read_manifest(path, stage=stage, key=key)
    try:
        if url_of(path) is None:
            _verify_files(path, manifest)
        else:
            _verify_copy(path, manifest)
    except OSError as error:
        raise CommitError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    return manifest


def _verify_copy(path: Path, manifest: Manifest) -> None:
    """Check this machine's copy of a directory in a store, and fetch it if it is missing, altered or out of date.

    Raises:
        CommitError: what the store has is not what its manifest says. OSError: the copy cannot be read or written.
    """
    with contextlib.suppress(CommitError, FileNotFoundError):
        if Manifest.of_json((path / MANIFEST).read_bytes(), str(path)) == manifest:
            return _verify_files(path, manifest)
    with trees.fetching(path, list(manifest.files), digests(manifest.files)) as staging:
        (staging / MANIFEST).write_bytes(sealed(manifest))
        try:
            _verify_files(staging, manifest)
        except CommitError as error:
            raise CommitError(str(error).replace(str(staging), address(path))) from error
    return None


def fetched(path: Path) -> Path:
    """Return a committed directory whose files are on this machine: of a URL, its copy, verified; a local one as it is.

    Raises:
        CommitError: see `verify`.
    """
    if url_of(path) is not None:
        verify(path)
    return path


def fetch_files(path: Path, *names: str) -> None:
    """Have some files of a committed directory on this machine, those of them that it has; no-op for a local path.

    Raises:
        CommitError: the directory is not committed, or a file in the store is not what its manifest says.
    """
    if url_of(path) is None:
        return
    manifest = read_manifest(path)
    files = {name: entry for name, entry in manifest.files.items() if name in names}
    lacking = []
    for name, entry in files.items():
        try:
            _require_bytes(path, {name: entry})
        except (CommitError, OSError):
            lacking.append(name)
    if not lacking:
        return
    with trees.fetching_into(path, lacking, digests(manifest.files)) as staging:
        try:
            _require_bytes(staging, {name: files[name] for name in lacking})
        except CommitError as error:
            raise CommitError(str(error).replace(str(staging), address(path))) from error


def require_whole(path: Path, *, stage: str | None = None, key: str | None = None) -> None:
    """Check a directory that others will read: as `verify` does; of a URL the sizes of its files, which stay there.

    Raises:
        CommitError: see `verify`.
    """
    if url_of(path) is None:
        verify(path, stage=stage, key=key)
        return
    manifest = read_manifest(path, stage=stage, key=key)
    found = trees.sizes(Path(path), digests(manifest.files))
    for name, entry in manifest.files.items():
        if found.get(name) != entry.bytes:
            there = f"has {found[name]} bytes" if name in found else "is missing"
            raise CommitError(f"{address(path)}/{name}: {there}, {MANIFEST} says {entry.bytes}")


def digests(files: Mapping[str, FileEntry]) -> dict[str, str]:
    """Return each file's SHA-256, by name."""
    return {name: entry.sha256 for name, entry in files.items()}


def verify_file(path: Path, name: str) -> Manifest:
    """Check one file of a committed directory against its manifest, and no other.

    Raises:
        CommitError: see `verify`.
    """
    manifest = read_manifest(path)
    try:
        if name not in manifest.files:
            raise CommitError(f"{path / name}: is not in {MANIFEST}")
        fetch_files(path, name)
        _require_bytes(path, {name: manifest.files[name]})
    except OSError as error:
        raise CommitError(f"{path / name}: cannot be read: {error.strerror}") from error
    return manifest


def _verify_files(path: Path, manifest: Manifest) -> None:
    present = set(regular_files(path)) - {MANIFEST}
    for name in sorted(present - set(manifest.files)):
        raise CommitError(f"{path / name}: is not in {MANIFEST}: the directory was altered after its commit")
    for name in manifest.files:
        if name not in present:
            raise CommitError(f"{path / name}: is named in {MANIFEST} but missing")
    _require_bytes(path, manifest.files)


def _require_bytes(path: Path, files: Mapping[str, FileEntry]) -> None:
    """Check that files have the sizes and SHA-256 of their entries.

    Raises:
        CommitError: one has others. OSError: one cannot be read.
    """
    for name, entry in files.items():
        size = (path / name).stat().st_size
        if size != entry.bytes:
            raise CommitError(f"{path / name}: has {size} bytes, {MANIFEST} says {entry.bytes}: truncated or altered")
    for name, found in hash_all(path, list(files)).items():
        if found != files[name].sha256:
            raise CommitError(f"{path / name}: SHA-256 {found[:12]}… is not the {MANIFEST}'s: the file was altered")
