"""Text embeddings: a sentence encoder over the distinct texts, distributed over the ranks, with a cache.

Embedding takes most of the time of a first prepare, so its result is committed to the cache under the digest of all it
depends on. Batches are formed before they are distributed to the ranks, and each runs on one thread: the bytes are the
same for any number of ranks and cores.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from sidestack.infra.commit import committing
from sidestack.infra.config import digest
from sidestack.infra.distributed import World, broadcast, raise_on_all_ranks
from sidestack.infra.errors import ConfigError
from sidestack.infra.manifest import is_committed, verify
from sidestack.infra.parquet import open_parquet, read_row_group, restored_schema, row_groups
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.prepare.columns import embeddings
from sidestack.pipelines.prepare.text_config import TextConfig

Vectors = npt.NDArray[np.float16]
Batch = tuple[npt.NDArray[np.int64], dict[str, torch.Tensor]]


def embed_texts(
    texts: Sequence[str], model: Path, config: TextConfig, cache_dir: Path, world: World, log: RunLog
) -> Path:
    """Embed the distinct texts that the cache lacks; every rank must call it.

    Args:
        texts: distinct and ascending. model: the folder of a sentence-transformers model.

    Returns:
        the committed cache directory, for `read_embeddings`.

    Raises:
        ConfigError: the folder has no model. CommitError: the cache was altered.
    """
    with raise_on_all_ranks(world, "opening the text model"):
        key = _key(texts, model, config)
    cached = cache_dir / "text" / key[:16]
    if broadcast(world, is_committed(cached)):
        with raise_on_all_ranks(world, "verifying the cached text embeddings"):
            verify(cached)
        log.info(f"texts: {len(texts):,} embeddings taken from {cached}")
        return cached
    with (
        committing(cached, world, stage="text-embeddings", key=key) as staging,
        raise_on_all_ranks(world, "embedding the texts"),
    ):
        _embed_share(texts, model, config, staging, world, log)
    return cached


def read_embeddings(cached: Path, num_texts: int) -> Vectors:
    """Read the embeddings of a cache directory, in the order of its texts: float16, unit length."""
    parts = [read_row_group(group) for group in row_groups(sorted(cached.glob("*.parquet")))]
    table = pa.concat_tables(parts).combine_chunks()
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    vectors_ND = np.empty((num_texts, len(flat) // num_texts), np.float16)
    vectors_ND[table["text"].to_numpy()] = flat.reshape(num_texts, -1)
    return vectors_ND


def embedding_dim(cached: Path) -> int:
    """Return the dimensions of a cache directory's embeddings, without reading them."""
    with open_parquet(min(cached.glob("*.parquet"))) as file:
        size: int = restored_schema(file.schema_arrow).field("embedding").type.list_size
    return size


def _key(texts: Sequence[str], model: Path, config: TextConfig) -> str:
    weights = model / "model.safetensors"
    if not weights.is_file():
        raise ConfigError(f"prepare.source.text.package {config.package!r}: {weights} is missing: no text model there")
    files = sorted(path for path in model.rglob("*.json")) + [weights]
    return digest({
        "texts": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "model": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        "batch_size": config.batch_size,
    })  # fmt: skip


def _embed_share(
    texts: Sequence[str], model: Path, config: TextConfig, staging: Path, world: World, log: RunLog
) -> None:
    """Embed this rank's batches into its own file."""
    encoder = _load(model, world.device)
    batches = list(_batches(texts, encoder, config.batch_size))[world.rank :: world.size]
    dim = encoder.get_embedding_dimension()
    schema = pa.schema([pa.field("text", pa.int64()), pa.field("embedding", pa.list_(pa.float16(), dim))])
    total = sum(len(rows) for rows, _ in batches)
    part = staging / f"part-{world.rank:05d}.parquet"
    with log.progress(total, f"texts embedded by rank {world.rank}") as advance, TableWriter(part, schema) as writer:
        for (rows, _), vectors_BD in zip(batches, _forward_all(encoder, batches, world), strict=True):
            column = embeddings(vectors_BD, np.ones(len(rows), bool))
            writer.write(pa.table([pa.array(rows), column], schema=schema))
            advance(len(rows))


def _load(model: Path, device: torch.device) -> Any:
    # Set before the import: the libraries read them once, and must not download a model.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return SentenceTransformer(str(model), device=str(device)).eval()


def _batches(texts: Sequence[str], encoder: Any, batch_size: int) -> Iterator[Batch]:
    """Divide the texts into batches of similar length, to limit padding."""
    lengths_N = np.array([len(ids) for ids in encoder.tokenizer(list(texts))["input_ids"]])
    order_N = np.argsort(lengths_N, kind="stable")
    for start in range(0, len(order_N), batch_size):
        rows = order_N[start : start + batch_size]
        yield rows, encoder.preprocess([texts[row] for row in rows])


def _forward_all(encoder: Any, batches: Sequence[Batch], world: World) -> Iterator[Vectors]:
    """Run the batches, in order, on a thread for each of this rank's cores."""
    on_gpu = world.device.type == "cuda"
    threads = 1 if on_gpu else max(1, (os.cpu_count() or 1) // world.size)

    def forward(batch: Batch) -> Vectors:
        with torch.inference_mode():
            inputs = {name: value.to(world.device) for name, value in batch[1].items() if torch.is_tensor(value)}
            vectors_BD = encoder(inputs)["sentence_embedding"].float()
            return np.asarray(torch.nn.functional.normalize(vectors_BD, dim=1).half().cpu().numpy())

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(forward, batches)
