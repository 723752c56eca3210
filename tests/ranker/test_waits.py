"""No operator between the looked-up embeddings and the gradients makes the host wait for a value from a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sidestack.infra.distributed import World
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.constants import read_constants
from sidestack.ranker.features import arm_features
from sidestack.ranker.reader import to_ranker_batch
from sidestack.ranker.sharding import build_sharded
from tests.ranker.dataset import REQUEST_SPEC, SIDS, write_dataset
from tests.ranker.training import config_of, open_training

# Operators whose result's shape, or whose use by Python, needs the values of a tensor.
READING_VALUES = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_dim",
    "_unique2",
}


class NoWaits(TorchDispatchMode):
    """Fail on operators for which the host would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        is_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        is_by_values = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        assert name not in READING_VALUES and not is_mask and not is_by_values, f"the host waits for {func}"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("waits") / "dataset", rows_a_day=192, impressions=6)


@pytest.mark.parametrize("arm", ["none", "dense", "sid_ngram", "hde", "side", "kmeans"])
@pytest.mark.parametrize("history", [{}, {"encoder_layers": 1, "pooling": "target"}], ids=["pma", "options"])
@pytest.mark.parametrize("children", ["given", "entire_space"])
def test_host_does_not_wait_for_a_gpu_in_forward_and_backward(
    world: World, dataset: Path, arm: str, history: dict[str, Any], children: str
) -> None:
    config = config_of(arm, model={"history": history}, training={"children": children})
    features = arm_features(REQUEST_SPEC, config, SIDS)
    module = build_sharded(
        features, config, world, read_constants(read_dataset(dataset), features.constants)
    ).model.module
    batch = to_ranker_batch(next(open_training(dataset, arm, batch_size=64).epoch(0)), features)
    bags, request_bags = module.bags(batch.bags).wait(), module.request_bags(batch.request_bags).wait()
    vectors = module.looked_up(bags, request_bags, module.sequences(batch.sequences).wait())
    with NoWaits():
        loss, _ = module.loss(module.body(batch, vectors), batch)
        loss.backward()


def test_wait_of_the_host_is_detected() -> None:
    ones_N = torch.ones(3)
    with pytest.raises(AssertionError, match="the host waits"), NoWaits():
        ones_N[ones_N > 0]
    with pytest.raises(AssertionError, match="the host waits"), NoWaits():
        bool(ones_N.isfinite().all())
