"""Sources in an object store: their files are copied to the machine that reads them."""

from pathlib import Path

from sidestack.infra.distributed import World, raise_on_all_ranks
from sidestack.infra.remote.copies import fetch_sources
from sidestack.infra.remote.urls import url_of
from sidestack.pipelines.prepare.contract import SourceConfig


def fetch_source(source: SourceConfig) -> None:
    """Have a source's files on this machine: those that are new or were changed are fetched; no-op for local ones.

    Raises:
        DataError: there is nothing at a URL. RemoteError: its store cannot be reached, or refuses.
    """
    fetch_sources(_of_urls(source))


def fetch_source_to_nodes(source: SourceConfig, world: World) -> None:
    """Have a source's files on every node; every rank calls.

    Raises:
        DataError, RemoteError: see `fetch_source`. StageError: the same, on another rank.
    """
    if not _of_urls(source):
        return
    with raise_on_all_ranks(world.committing, "fetching the source"):
        if world.local_rank == 0:
            fetch_source(source)


def _of_urls(source: SourceConfig) -> list[Path]:
    return [path for path in source.paths() if url_of(path) is not None]
