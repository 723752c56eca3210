"""The ranker's benchmark: switched kernels, times of a step's parts, and equal batches for torchrec's example."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from sidestack.benchmarks.golden_example import golden_batch, golden_dlrm, golden_pipeline, our_network, our_pipeline
from sidestack.benchmarks.ranker import ReadByItself, scan, stream, use_unpooled_kernels
from sidestack.benchmarks.timing import run_program
from sidestack.benchmarks.trial import PARTS, StepParts, Trial, kernels, training_split
from sidestack.infra.distributed import World, process_group
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.ranker.cpu_sequence_lookup import BagsOfOne
from sidestack.ranker.model import StepOutput
from sidestack.ranker.step_runner import StepRunner
from tests.ranker.dataset import write_dataset


def clear_torchrun_variables(patch: pytest.MonkeyPatch) -> None:
    """Delete torchrun's variables, and restore them when the patch ends."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        patch.setenv(name, "")
        patch.delenv(name)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        clear_torchrun_variables(patch)
        with process_group() as world:
            yield world


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return read_dataset(write_dataset(tmp_path_factory.mktemp("ranker") / "dataset", rows_a_day=1024))


def test_times_of_the_parts_sum_to_the_step(world: World, dataset: Dataset) -> None:
    trial = Trial(dataset, "sid_ngram", world)
    parts = StepParts(trial)
    trial.steps(1)
    found = parts.milliseconds(3)
    trial.close()
    assert tuple(found) == (*PARTS, "step")
    assert sum(found[part] for part in PARTS) == pytest.approx(found["step"])
    assert all(found[part] > 0 for part in PARTS)


def test_kernels_are_switched_and_train_to_the_same_weights(world: World, dataset: Dataset) -> None:
    fast, slow, by_itself = (Trial(dataset, "sid_ngram", world, way) for way in (StepRunner, StepRunner, ReadByItself))
    use_unpooled_kernels(slow)
    switched = [sum(isinstance(kernel.forward, BagsOfOne) for kernel in kernels(one.sharded)) for one in (fast, slow)]
    assert switched == [1, 0]
    for trial in (fast, slow, by_itself):
        trial.steps(3)
    expected = fast.sharded.model.state_dict()["sequences.embeddings.t_history_sids.weight"].local_tensor()
    for trial in (slow, by_itself):
        found = trial.sharded.model.state_dict()["sequences.embeddings.t_history_sids.weight"].local_tensor()
        torch.testing.assert_close(found, expected)
    for trial in (fast, slow, by_itself):
        trial.close()


def _loss(output: object) -> float:
    return float(output.totals_3T[0].sum()) if isinstance(output, StepOutput) else float(output[0])  # type: ignore[index]


def test_golden_example_has_the_same_rows_and_tables(world: World, dataset: Dataset) -> None:
    split = training_split(dataset, "none")
    ours = next(stream(split, "none", world))
    theirs = golden_batch(ours, split.features)
    features = (*split.features.bags, *split.features.sequences)
    assert theirs.sparse_features.keys() == [feature.column for feature in features]
    rows = {**ours.bags.to_dict(), **ours.request_bags.to_dict(), **ours.sequences.to_dict()}
    for feature in features:
        found = [ids.tolist() for ids in rows[feature.column].to_dense()]
        if feature not in split.features.row_bags:
            found = [found[request] for request in ours.request_B.tolist()]
        assert [ids.tolist() for ids in theirs.sparse_features[feature.column].to_dense()] == found
    assert theirs.labels.equal(ours.labels_BT[:, 0])
    trial = Trial(dataset, "none", world)
    model = golden_dlrm(split.features, trial.config.model, world.device)
    tables = model.model.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    assert [(table.name, table.num_embeddings, table.embedding_dim) for table in tables] == [
        (feature.table, feature.rows, trial.config.model.embedding_dim) for feature in features
    ]
    again = golden_dlrm(split.features, trial.config.model, world.device)
    for pipeline, batch in (
        (golden_pipeline(model, world.device), theirs),
        (our_pipeline(again, world), theirs),
        (golden_pipeline(our_network(split.features, "none", world.device), world.device), ours),
    ):
        source = iter([batch] * 12)
        first, *_, last = [_loss(pipeline.progress(source)) for _ in range(12)]
        assert last < first  # it fits the repeated batch
    trial.close()


def test_scan_and_reader_read_the_same_files(world: World, dataset: Dataset) -> None:
    split = training_split(dataset, "side")
    scan(split, 2, threads=2)
    batches = list(islice(stream(split, "side", world), 99))
    assert sum(len(batch.labels_BT) for batch in batches) == 4 * 1024


@pytest.mark.long
def test_quick_run_writes_every_table_and_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_torchrun_variables(monkeypatch)
    run_program([sys.executable, "-m", "sidestack.benchmarks.ranker", "--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "ranker.json").read_text())["rows"]
    tables = {row["table"] for row in rows if "table" in row}
    assert tables == {"Reading", "A step", "Training", "Beside torchrec's golden example", "What each thing gives"}
    goals = [row["goal"] for row in rows if "goal" in row]
    assert len(goals) == 3 + 5 + 2 * 2 + 3
    page = (tmp_path / "ranker.md").read_text()
    assert all(f"## {table}" in page for table in tables)
