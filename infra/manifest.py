"""The manifest of a committed directory: its content, and verification of the directory against it."""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from sidestack.infra.config import Config
from sidestack.infra.errors import CommitError
from sidestack.infra.files import hash_all, open_regular, regular_files
from sidestack.infra.logs import LOG
from sidestack.infra.record import HISTORY_FILE, SUMMARY_FILE
from sidestack.infra.remote import trees
from sidestack.infra.remote.urls import address, url_of
from sidestack.infra.sealed import OWN_DIGEST, seal, unseal

MANIFEST = "manifest.json"
_WITHOUT_DIGEST = "sidestack/1"


class FileEntry(Config):
    """The manifest's entry for one file: digest, size, and for a Parquet file the number of rows."""

    sha256: str
    bytes: int
    rows: int | None = None


class Manifest(Config):
    """The description of a committed directory; its presence marks the directory as whole.

    `key` identifies the work (config, inputs, code), `inputs` holds the digests of the inputs' manifests, `facts`
    what the stage adds (the resolved config's digest, world size, a codebook's fingerprint).

    On disk it holds a digest of itself (`infra.sealed`), so that an edited key, stage or fact is detected. Manifests of
    format `sidestack/1` hold none; they are read, and the first one in a process is logged to stderr.
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
        """SHA-256 over the names and contents of the files, except the stage's record.

        The record (history and summary) holds durations. Without it, the same work done twice has the same digest, and
        the stages after it have the same key.
        """
        data = {name: entry.sha256 for name, entry in self.files.items() if name not in (HISTORY_FILE, SUMMARY_FILE)}
        lines = [f"{name} {sha256}" for name, sha256 in sorted(data.items())]
        return hashlib.sha256("\n".join([self.stage, *lines]).encode()).hexdigest()

    @classmethod
    def of_json(cls, content: bytes, file: str) -> "Manifest":
        """Parse the content of a manifest's file.

        Raises:
            CommitError: it is not ours, or was altered.
        """
        values, has_digest = unseal(content, file)
        try:
            manifest = cls.model_validate(values)
        except ValidationError as error:
            raise CommitError(f"{file}: not a sidestack manifest ({error.error_count()} faults)") from error
        if has_digest != (manifest.format != _WITHOUT_DIGEST):
            raise CommitError(f"{file}: format {manifest.format!r} does not go with its {OWN_DIGEST}: it was altered")
        if not has_digest:
            _warn_without_digest(file)
        return manifest


_warned_without_digest: list[str] = []


def _warn_without_digest(file: str) -> None:
    if not _warned_without_digest:
        _warned_without_digest.append(file)
        LOG.warning(
            f"{file}: was committed by an earlier version, whose manifests hold no digest of themselves: its files are"
            " checked, an edited key or fact of it is not found; so with others of that version"
        )


def is_committed(path: Path) -> bool:
    """Return whether the directory has a manifest."""
    if url_of(path) is not None:
        return trees.read_manifest_bytes(Path(path), MANIFEST) is not None
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: Path, *, stage: str | None = None, key: str | None = None) -> Manifest:
    """Read a committed directory's manifest without hashing its files.

    Args:
        path: the directory. stage, key: the values that its manifest must have, if they are set.

    Raises:
        CommitError: there is no manifest, it is not one of ours or was altered, or it is of another stage or key.
    """
    found = find_manifest(path, stage=stage, key=key)
    if found is None:
        raise CommitError(f"{address(path)}: not a committed directory (no {MANIFEST})")
    return found


def find_manifest(path: Path | str, *, stage: str | None = None, key: str | None = None) -> Manifest | None:
    """Read a committed directory's manifest; return None if the directory is not committed.

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
    """Read the manifest and check every file's size and SHA-256 against it.

    For a URL, this machine's copy is checked, and fetched if it is missing.

    Args:
        path: the directory. stage, key: see `read_manifest`.

    Raises:
        CommitError: see `read_manifest`; or a file is missing, of another size, altered, not named in the manifest, not
            a regular file, or cannot be read.
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
        CommitError: the store's files do not match its manifest. OSError: the copy cannot be read or written.
    """
    with contextlib.suppress(CommitError, FileNotFoundError):
        if Manifest.of_json((path / MANIFEST).read_bytes(), str(path)) == manifest:
            return _verify_files(path, manifest)
    with trees.fetching(path, list(manifest.files), digests(manifest.files)) as staging:
        (staging / MANIFEST).write_bytes(seal(manifest))
        try:
            _verify_files(staging, manifest)
        except CommitError as error:
            raise CommitError(str(error).replace(str(staging), address(path))) from error
    return None


def fetched(path: Path) -> Path:
    """Return a committed directory with its files on this machine: for a URL its verified copy; a local one as it is.

    Raises:
        CommitError: see `verify`.
    """
    if url_of(path) is not None:
        verify(path)
    return path


def fetch_files(path: Path, *names: str) -> None:
    """Fetch some files of a committed directory to this machine, skipping those it lacks; no-op for a local path.

    Raises:
        CommitError: the directory is not committed, or a file in the store does not match its manifest.
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
    """Check a directory that others will read: as `verify` does; for a URL only its files' sizes, without a fetch.

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
    """Check only one file of a committed directory against its manifest.

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
        CommitError: a size or SHA-256 differs. OSError: a file cannot be read.
    """
    for name, entry in files.items():
        size = (path / name).stat().st_size
        if size != entry.bytes:
            raise CommitError(f"{path / name}: has {size} bytes, {MANIFEST} says {entry.bytes}: truncated or altered")
    for name, found in hash_all(path, list(files)).items():
        if found != files[name].sha256:
            raise CommitError(f"{path / name}: SHA-256 {found[:12]}… is not the {MANIFEST}'s: the file was altered")
