"""Paths from a user: local ones, and URLs of an object store, which map to paths on this machine.

All code works with `pathlib.Path`. `local_path` maps a URL to a path in this machine's *mirror*, a folder of its own:
`s3://bucket/runs` becomes `<mirror>/s3/bucket/runs`. So joins, names and relative paths work as for any folder. For use
on another machine, `address` converts a path back. The files in the mirror are copies of the store's files, or local on
purpose, such as logs (`infra.remote.copies`).

This module imports only the standard library and our errors: components also read URLs, and start without torch.
"""

import argparse
import functools
import os
import re
import socket
import sys
from pathlib import Path

from sidestack.infra.errors import AddressError

SCHEMES = ("s3", "gs", "abfs", "abfss", "hdfs")
MIRROR_VARIABLE = "SIDESTACK_MIRROR"
"""The variable with the mirror's folder; by default it is in the user's cache."""

_OTHER_NAMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "az": "abfs", "adl": "abfs", "wasb": "abfs", "wasbs": "abfss"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_LOST_A_SLASH = re.compile(rf"(?:{'|'.join([*SCHEMES, 'file'])}):/(?!/)")


def local_path(path: str | Path) -> Path:
    """Return the path on this machine that stands for a local path or a URL.

    Raises:
        AddressError: it looks like a URL but cannot be used as one; the message shows no password.
    """
    text = os.fspath(path)
    url = _URL.fullmatch(text)
    if url is None:
        if _LOST_A_SLASH.match(text):
            raise AddressError(f"{text!r}: a URL has two slashes after its scheme, such as s3://bucket/folder")
        return Path(path)
    scheme, rest = url[1].lower(), url[2]
    if scheme == "file":
        return _local_file(text, rest)
    host, _, inside = rest.partition("/")
    _check(scheme, host, text)
    parts = inside.rstrip("/").split("/") if inside.strip("/") else []
    if any(part in ("", ".", "..") for part in parts) or not inside.isprintable():
        raise AddressError(
            f"'{scheme}://{host}/{inside}': has an empty part, . or .. in its path, or a control character"
        )
    return mirror() / scheme / Path(host, *parts)


def _local_file(text: str, rest: str) -> Path:
    if not rest.startswith("/"):
        raise AddressError(f"{text!r}: a file on this machine is file:///folder, with three slashes")
    return Path(rest)


def _check(scheme: str, host: str, text: str) -> None:
    shown = f"{scheme}://…" if "@" in host else repr(text)
    if scheme not in SCHEMES:
        other = f"; write {_OTHER_NAMES[scheme]}://" if scheme in _OTHER_NAMES else ""
        raise AddressError(f"{shown}: schemes are {', '.join(f'{one}://' for one in SCHEMES)} and file://{other}")
    user, _, name = host.rpartition("@")
    if ":" in user or (user and scheme in ("s3", "gs")):
        raise AddressError(
            f"{shown}: a URL holds no credential; they come from the environment, a profile, or the machine's role"
        )
    if not re.fullmatch(r"[\w.-]+(:\d+)?", name) or name in (".", "..") or not re.fullmatch(r"[\w.-]*", user):
        what = "host, such as hdfs://namenode:8020/folder" if scheme == "hdfs" else f"bucket, such as {scheme}://bucket"
        raise AddressError(f"{shown}: names no {what}")


def mirror() -> Path:
    """Return this machine's folder of the paths that stand for URLs.

    By default it is in the user's cache, in a folder named after the host: home directories are often shared.
    """
    named = os.environ.get(MIRROR_VARIABLE, "").strip()
    if named:
        return _real_path(named)
    return _real_path(f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/sidestack/{socket.gethostname() or 'host'}")


@functools.cache  # called for every path
def _real_path(folder: str) -> Path:
    return Path(os.path.realpath(Path(folder).expanduser()))


def url_of(path: str | Path) -> str | None:
    """Return the URL that a path stands for; None: it is a local path."""
    found = os.path.normpath(Path(path).absolute())
    root = f"{mirror()}{os.sep}"
    if not found.startswith(root):
        return None
    scheme, _, rest = found.removeprefix(root).partition("/")
    return f"{scheme}://{rest}" if rest else None


def address(path: str | Path) -> str:
    """Return a path's name on every machine: the URL that it stands for, or the path itself."""
    return url_of(path) or os.fspath(path)


def with_urls(text: str) -> str:
    """Replace paths of the mirror in a message by their URLs."""
    for scheme in SCHEMES:
        text = text.replace(f"{mirror()}/{scheme}/", f"{scheme}://")
    return text


def require_local(path: str | Path) -> Path:
    """Return a path that must be local.

    Raises:
        AddressError: it is a URL.
    """
    found = local_path(path)
    if (url := url_of(found)) is not None:
        raise AddressError(f"{url!r}: must be a path on this machine; object stores are not taken here")
    return found


def path_argument(text: str) -> Path:
    """Return `local_path` of a command's argument; a type for `argparse`."""
    try:
        return local_path(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_argument(text: str) -> Path:
    """Return `require_local` of a command's argument; a type for `argparse`."""
    try:
        return require_local(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":  # a job's script calls this to locate a URL's logs on its node
    print(local_path(sys.argv[1]))
