"""Which layer makes a loss not finite: a saved batch, run once more.

    python -m ranker.replay_batch DIR [--rank N]

DIR is the `<out>.nonfinite` that a training has left. The batch goes forward through the model as the last checkpoint
beside it holds it, on one process; without one, through the model with its initial weights.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidestack.infra.distributed import World, process_group
from sidestack.infra.errors import SidestackError
from sidestack.infra.manifest import MANIFEST, fetched
from sidestack.infra.remote.copies import folders
from sidestack.infra.remote.urls import local_argument, local_path
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.stage import quiet
from sidestack.infra.state import fill, read_state
from sidestack.ranker.constants import read_constants
from sidestack.ranker.saved_batch import SavedBatch, read_batch, saved_ranks
from sidestack.ranker.sharding import ShardedRanker, build_sharded


class Replay(NamedTuple):
    """The result of a replay.

    Attributes:
        checkpoint: the source of the weights; None: initial weights. inputs: the batch's non-finite tensors.
        layer: the first layer with a non-finite output; None: all are finite. loss: of this rank's rows only.
    """

    checkpoint: Path | None
    inputs: list[str]
    layer: str | None
    loss: float

    def __str__(self) -> str:
        """Return the result as lines of text."""
        weights = "initial weights" if self.checkpoint is None else f"weights of {self.checkpoint}"
        layer = f"the first output that is not finite is that of {self.layer}"
        if self.layer is None:
            layer = "every layer's output is finite: the weights have diverged in the steps after"
        inputs = f"not finite in the batch: {', '.join(self.inputs) or 'nothing'}"
        return "\n".join([weights, inputs, layer, f"loss {self.loss}"])


def replay(folder: Path, rank: int, world: World) -> Replay:
    """Run a saved batch forward, without changing a weight.

    Raises:
        DataError: there is no such batch, or its dataset cannot be read.
    """
    saved, batch = read_batch(folder, rank)
    sharded, checkpoint = _model(saved, world)
    inputs = [name for name, value in vars(batch).items() if not _is_finite(value)]
    found: list[str] = []

    def check_output(name: str, output: Any) -> None:
        if not all(map(_is_finite, _tensors(output))):
            found.append(name)

    for name, module in sharded.model.module.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: check_output(name, output))
    with torch.no_grad():
        loss, _ = sharded.model(batch.to(world.device))
    return Replay(checkpoint, inputs, found[0] if found else None, float(loss))


def _model(saved: SavedBatch, world: World) -> tuple[ShardedRanker, Path | None]:
    """Build the model, and load the last checkpoint if there is one."""
    features = saved.ranker.features()
    constants = read_constants(read_dataset(fetched(local_path(saved.dataset))), features.constants)
    sharded = build_sharded(features, saved.ranker.config, world, constants)
    steps = sorted(
        path for path in folders(local_path(saved.checkpoints), having=MANIFEST) if path.name.startswith("step-")
    )
    if not saved.checkpoints or not steps:
        return sharded, None
    sharded.make_dense_state()
    fill(sharded.parted_state(features)[0], read_state(fetched(steps[-1]), sharded.shards(features)))
    return sharded, steps[-1]


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.isfinite().all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors of a layer's output, whatever its structure."""
    match value:
        case Tensor():
            yield value
        case dict():
            for one in value.values():
                yield from _tensors(one)
        case list() | tuple():
            for one in value:
                yield from _tensors(one)
        case _ if hasattr(value, "values"):  # jagged and keyed tensors
            yield from _tensors(value.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="ranker.replay_batch", description=__doc__)
    parser.add_argument("folder", type=local_argument, metavar="DIR", help="the <out>.nonfinite of a training")
    parser.add_argument("--rank", type=int, help="whose batch; by default the first that is there")
    arguments = parser.parse_args(argv)
    quiet()
    try:
        rank = arguments.rank if arguments.rank is not None else next(iter(saved_ranks(arguments.folder)), 0)
        with process_group() as world:
            print(replay(arguments.folder, rank, world))
    except SidestackError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
