"""Training gives equal results on any number of ranks, equal starts of weights that arms share, and joint failures."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from sidestack.infra.distributed import World
from sidestack.infra.errors import ConfigError, DataError, StageError
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.preparation import open_splits
from sidestack.ranker.sharding import build_sharded
from tests.datasets import joined, spoil, write_snapshot_of
from tests.distributed import run_distributed
from tests.ranker.dataset import CHAIN, REQUEST_SPEC, SIDS, SPEC, all_days, write_dataset
from tests.ranker.training import ARMS as EVERY_ARM
from tests.ranker.training import Outcome, config_of, named, run_steps

STEPS = 12  # last bits differ between ranks, and the difference grows tenfold every few steps
ARMS = tuple(EVERY_ARM)
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "entire_space": {"training": {"children": "entire_space"}},
    "hashed": {"model": {"table_rows": {"item_id": 64, "history_item_ids": 50, "user_id": 7, "topics": 3}}},
    "history": {
        "model": {"history": {"heads": 2, "encoder_layers": 1, "pooling": "target", "max_length": 3}},
    },
}
"""Settings other than the defaults, applied to arm `side`."""
CHAINS: dict[str, dict[str, dict[str, Any]]] = {
    "chain": {"training": {"task_weights": {"cart": 1.5}}},
    "chain_entire_space": {"training": {"children": "entire_space"}},
}
"""Settings of trainings on a dataset whose tasks are a chain of three."""
REQUESTS: dict[str, dict[str, dict[str, Any]]] = {
    "requests": {"training": {"rows_per_request": 5}},
    "requests_history": {"training": {"rows_per_request": 3}, **VARIANTS["history"]},
}
"""Settings of trainings of arm `sid_ngram` on requests of 5 rows; ranks have different numbers of them in a batch."""
TRAININGS = (*ARMS, *VARIANTS, *CHAINS, *REQUESTS)
GOLDEN = Path(__file__).with_name("golden_losses.json")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("training") / "dataset")


def every_training(world: World, dataset: Path, chain: Path, requests: Path, steps: int) -> dict[str, Outcome]:
    found = every_arm(world, dataset, steps)
    found |= {name: run_steps(world, chain, config_of("side", **sections), steps) for name, sections in CHAINS.items()}
    for name, sections in REQUESTS.items():
        found[name] = run_steps(world, requests, config_of("sid_ngram", **sections), steps)
    return found


def every_arm(world: World, dataset: Path, steps: int) -> dict[str, Outcome]:
    configs = {arm: config_of(arm) for arm in ARMS}
    configs |= {name: config_of("side", **sections) for name, sections in VARIANTS.items()}
    return {name: run_steps(world, dataset, config, steps) for name, config in configs.items()}


def refusal(world: World, dataset: Path) -> str:
    """Build tables that fit nowhere, and return the error."""
    config = config_of("none", sharding={"memory_gib": 1e-7})
    fitting, _ = open_splits(read_dataset(dataset), config)
    try:
        build_sharded(fitting.features, config, world, ModelConstants())
    except (ConfigError, StageError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def failed_read(world: World, dataset: Path) -> str:
    """Train on data with a bad row that only the second rank reads, and return the error."""
    try:
        run_steps(world, dataset, config_of("none", training={"batch_size": 512}), 4)
    except (DataError, StageError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def both(world: World, dataset: Path, chain: Path, requests: Path, broken: Path) -> tuple[str, str, dict[str, Outcome]]:
    return refusal(world, dataset), failed_read(world, broken), every_training(world, dataset, chain, requests, STEPS)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("chain") / "dataset", tasks=CHAIN)


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("requests") / "dataset", impressions=5)


@pytest.fixture(scope="module")
def one_rank(dataset: Path, chain: Path, requests: Path) -> dict[str, Outcome]:
    (outcomes,) = run_distributed(every_training, dataset, chain, requests, STEPS, world_size=1)
    return outcomes


@pytest.fixture(scope="module")
def on_both_ranks(
    dataset: Path, chain: Path, requests: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Any, ...]]:
    broken = write_dataset(tmp_path_factory.mktemp("broken") / "dataset")

    def with_wrong_item(table: pa.Table) -> pa.Table:
        ids = table["item_id"].to_numpy().copy()
        ids[500] = 999
        at = table.schema.get_field_index("item_id")
        return table.set_column(at, table.schema.field(at), pa.array(ids))

    spoil(broken, "events", SPEC.train[1], with_wrong_item)
    return run_distributed(
        both, dataset, chain, requests, broken, world_size=2
    )  # one start of two processes for all tests


@pytest.fixture(scope="module")
def two_ranks(on_both_ranks: list[tuple[Any, ...]]) -> dict[str, Outcome]:
    first, second = (rank[2] for rank in on_both_ranks)
    assert all(first[arm].losses == second[arm].losses for arm in first)  # every rank knows the global loss
    return first


@pytest.mark.parametrize("arm", TRAININGS)
def test_one_and_two_ranks_train_the_same(
    arm: str, one_rank: dict[str, Outcome], two_ranks: dict[str, Outcome]
) -> None:
    one, two = one_rank[arm], two_ranks[arm]
    assert torch.tensor(two.losses).allclose(torch.tensor(one.losses), rtol=1e-4, atol=1e-5)
    assert two.weights.keys() == one.weights.keys()
    for name, expected in one.weights.items():
        torch.testing.assert_close(two.weights[name], expected, rtol=1e-3, atol=1e-3, msg=named(name))


@pytest.mark.parametrize("arm", TRAININGS)
def test_gradients_have_the_same_size_on_one_and_two_ranks(
    arm: str, one_rank: dict[str, Outcome], two_ranks: dict[str, Outcome]
) -> None:
    # Adagrad and Adam are insensitive to the scale of a gradient, but their sums of squares are not.
    one, two = one_rank[arm].states, two_ranks[arm].states
    summed = [name for name in one if name.endswith(("momentum1", "sum", "exp_avg_sq"))]
    assert len(summed) > len(one_rank[arm].plan)
    for name in summed:
        expected = one[name].sum()
        assert expected > 0
        torch.testing.assert_close(two[name].sum(), expected, rtol=2e-3, atol=1e-9, msg=named(name))


def test_tables_are_sharded_over_the_ranks(two_ranks: dict[str, Outcome]) -> None:
    plan = two_ranks["sid_ngram"].plan
    assert plan["t_history_item_ids"] == "row_wise"
    assert set(plan.values()) <= {"table_wise", "row_wise"}


@pytest.mark.parametrize("arm", ARMS)
def test_weights_that_arms_share_start_equal_on_any_number_of_ranks(
    arm: str, one_rank: dict[str, Outcome], two_ranks: dict[str, Outcome]
) -> None:
    start, plain = one_rank[arm].start, one_rank["none"].start
    assert all(torch.equal(two_ranks[arm].start[name], value) for name, value in start.items())
    # Every arm with content contains the names and values of the arm without content.
    assert all(torch.equal(start[name], value) for name, value in plain.items())
    own = r"^body\.content\.|^body\.history\.content\.|t_(item|history)_(sid|lines|clusters)"
    assert all(re.search(own, name) for name in start.keys() - plain.keys())
    if arm.startswith(("side", "dense")):
        assert {name for name in start.keys() - plain.keys() if name.startswith("body.history")} == {
            "body.history.content.omega"
        }


def test_settings_share_the_weights_that_they_do_not_change(one_rank: dict[str, Outcome]) -> None:
    side, entire_space, history = (one_rank[name].start for name in ("side", "entire_space", "history"))
    assert side.keys() == entire_space.keys()
    assert all(torch.equal(entire_space[name], value) for name, value in side.items())
    changed = {name for name, value in side.items() if not torch.equal(history[name], value)}
    assert changed == {"body.history.attention.query.weight"}  # the query has fewer features
    assert all(name.startswith("body.history.encoder.") for name in history.keys() - side.keys())


def test_losses_match_the_golden_file(one_rank: dict[str, Outcome]) -> None:
    """A change of these losses is a change of the model, the data order or the start.

    Regenerate them by `python -m tests.ranker.test_training`, and say in the commit what changed them.
    """
    golden = json.loads(GOLDEN.read_text())
    for arm in ARMS:
        assert torch.tensor(one_rank[arm].losses[:8]).allclose(torch.tensor(golden[arm]), rtol=1e-4, atol=0)


def test_failed_plan_raises_on_every_rank(on_both_ranks: list[tuple[Any, ...]]) -> None:
    first, second = (rank[0] for rank in on_both_ranks)
    assert first.startswith("NoPlanError: ranker.sharding: no plan")
    assert "memory_gib=1e-07" in first
    assert second.startswith("StageError: planning the embedding tables: rank 0 failed: ranker.sharding: no plan")


def test_a_bad_row_on_one_rank_stops_every_rank(on_both_ranks: list[tuple[Any, ...]]) -> None:
    first, second = (rank[1] for rank in on_both_ranks)
    fault = "part-00000.parquet, row group 3: column 'item_id': id 999 is outside the table [0, 300)"
    assert second.startswith("DataError: ")
    assert "/events/date=2024-01-04/" in second and fault in second
    assert first.startswith("StageError: reading events: rank 1 failed: ")
    assert fault in first


@pytest.mark.parametrize("name", ["side", "sid_ngram", "history"])
def test_requests_of_several_impressions_train_like_requests_of_one_row_each(
    world: World, tmp_path: Path, name: str
) -> None:
    requests = write_dataset(tmp_path / "requests", rows_a_day=256, impressions=8)
    days = {day: joined(requests, None, day, day).drop_columns(["request_id"]) for day in all_days()}
    rows = write_snapshot_of(tmp_path / "rows", REQUEST_SPEC, [], [], days, SIDS.values())
    counts = [len(joined(path, ["request_id"])["request_id"].unique()) for path in (requests, rows)]
    assert counts == [6 * 256 // 8, 6 * 256]
    one_by_one = {"training": {"rows_per_request": 1}}  # whole requests would be read in another order
    config = config_of(name if name in ARMS else "side", **VARIANTS.get(name, {}), **one_by_one)
    ours, theirs = (run_steps(world, path, config, STEPS) for path in (requests, rows))
    assert torch.tensor(ours.losses).allclose(torch.tensor(theirs.losses), rtol=1e-4)
    for parameter, expected in theirs.weights.items():
        torch.testing.assert_close(ours.weights[parameter], expected, rtol=1e-3, atol=1e-3)


def renew_golden_losses() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (outcomes,) = run_distributed(every_arm, write_dataset(Path(folder) / "dataset"), STEPS, world_size=1)
    golden = {arm: outcomes[arm].losses[:8] for arm in ARMS}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    renew_golden_losses()
