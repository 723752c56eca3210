"""Run the stage's body as its main program does, with a stand-in for the sentence encoder."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch

from sidestack.infra.commit import committing
from sidestack.infra.config import parse
from sidestack.infra.distributed import World
from sidestack.infra.manifest import is_committed
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.prepare import text
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.stage import prepare

TINY_DIM = 8


class TinyEncoder(torch.nn.Module):
    """A stand-in that embeds a text as the first bytes of its SHA-256, and loads in milliseconds."""

    def tokenizer(self, texts: list[str]) -> dict[str, list[list[str]]]:
        return {"input_ids": [line.split() for line in texts]}

    def preprocess(self, texts: list[str]) -> dict[str, Any]:
        digests = [hashlib.sha256(line.encode()).digest()[:TINY_DIM] for line in texts]
        return {"bytes": torch.tensor([list(digest) for digest in digests], dtype=torch.float32), "prompt": "none"}

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": inputs["bytes"] - 128}

    def get_embedding_dimension(self) -> int:
        return TINY_DIM


def run_prepare(world: World, values: dict[str, Any], out: Path, packages: Path | None = None) -> dict[str, Any]:
    """Commit the prepare stage's output; return the facts it added. The cache is beside it unless `values` sets it."""
    values = {"cache_dir": str(out.parent / "cache"), **values}
    if packages is not None:
        sys.path.insert(0, str(packages))
    loader = text._load
    text._load = lambda model, device: TinyEncoder()
    facts: dict[str, Any] = {}
    try:
        config = parse(PrepareConfig, values, "test: prepare")
        with committing(out, world, stage="prepare", facts=facts) as staging:
            log = RunLog(staging if world.is_main else None)
            prepare(StageRun(config, {}, staging, world, log, facts))
    finally:
        text._load = loader
        if packages is not None:
            sys.path.remove(str(packages))
    return facts


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file's bytes by its name, except for manifests."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def made_of(out: Path) -> dict[str, bytes]:
    """Return the bytes of a snapshot and of all files of the store beside it, by name, without the stage's record."""
    snapshot = {name: found for name, found in files_of(out).items() if name not in ("history.jsonl", "summary.json")}
    return {**snapshot, **{f"store/{name}": found for name, found in files_of(out.parent / "store").items()}}


def digests(out: Path) -> dict[str, str]:
    """Return the digests of a snapshot's partitions, by table and slice."""
    return {f"{entry.table}/{entry.slice}": entry.digest for entry in read_dataset(out).snapshot.partitions}


def leftovers(folder: Path) -> list[Path]:
    """Return leftovers: temporary directories and files, and snapshots that were not committed."""
    found = [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    return found + [path for path in folder.rglob("snapshot.json") if not is_committed(path.parent)]
