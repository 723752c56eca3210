"""Run a function on several ranks of gloo or nccl, one process each, and raise an error if any rank raised one.

Ranks are forked from a server that has imported torch, torchrec and our packages once: a new interpreter spends seven
seconds of a core on these imports.
"""

import os
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Literal

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from sidestack.infra.distributed import Timeouts, World, process_group

_RANKS = get_context("forkserver")
_RANKS.set_forkserver_preload(
    [
        "sidestack.encoder.train",
        "sidestack.encoder.materialize",
        "sidestack.pipelines.prepare.__main__",
        "sidestack.ranker.train",
    ]
)


Backend = Literal["gloo", "nccl"]


def on_each_backend(ranks: int = 2) -> pytest.MarkDecorator:
    """Return a mark that parametrizes a test by `backend`: gloo, and nccl, skipped without a GPU for each rank."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = f"{ranks} ranks of nccl need as many GPUs; there are {num_gpus}"
    nccl = pytest.param("nccl", marks=pytest.mark.skipif(num_gpus < ranks, reason=reason))
    return pytest.mark.parametrize("backend", ["gloo", nccl])


def run_distributed(
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    backend: Backend = "gloo",
    timeout_s: float = 60.0,
    commit_timeout_s: float = 60.0,
) -> list[Any]:
    """Call `function(world, *args)` on every rank and return the results in rank order.

    Args:
        function: a module-level function; its arguments and result are pickled between processes.
        args: the arguments after `world`.
        world_size: the number of ranks.
        backend: with gloo no GPU is visible to the ranks; nccl needs one for each rank.
        timeout_s: the timeout of a collective.
        commit_timeout_s: the timeout of a collective around a commit.

    Raises:
        RankFailure: a rank raised; `errors` has each rank's traceback or None.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as in torchrun's agent
    environment = dict(os.environ)  # children inherit the fork server's environment, without what a test has set since
    if backend == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with ProcessPoolExecutor(world_size, mp_context=_RANKS) as pool:
        futures = [
            pool.submit(
                _on_rank,
                environment,
                function,
                args,
                rank,
                world_size,
                backend,
                store.port,
                timeout_s,
                commit_timeout_s,
            )
            for rank in range(world_size)
        ]
        results = [future.result() for future in futures]
    errors = [error for _, error in results]
    if any(errors):
        raise RankFailure(errors)
    return [value for value, _ in results]


class RankFailure(AssertionError):
    """At least one rank raised. `errors[rank]` is its traceback, or None."""

    def __init__(self, errors: list[str | None]) -> None:
        super().__init__("\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error))
        self.errors = errors


def _on_rank(
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    backend: Backend,
    port: int,
    timeout_s: float,
    commit_timeout_s: float,
) -> tuple[Any, str | None]:
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    try:
        with process_group(Timeouts(collective_s=timeout_s, commit_s=commit_timeout_s)) as world:
            assert isinstance(world, World) and world.backend == backend
            return function(world, *args), None
    except Exception:
        return None, traceback.format_exc()
