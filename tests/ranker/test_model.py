"""The whole model on one rank: empty histories, the query of the history, and the rows that each task learns from."""

import itertools
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy
from torchrec.modules.crossnet import LowRankCrossNet

from sidestack.infra.distributed import World
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.tables import TaskSpec, ancestors
from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.blocks import HistoryBlock, LowRankCross, Towers
from sidestack.ranker.config import ModelConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.features import arm_features
from sidestack.ranker.model import GlobalLoss, joint_logit
from sidestack.ranker.reader import to_ranker_batch
from sidestack.ranker.sharding import build_sharded
from tests.ranker.dataset import CHAIN, ONE_TASK, SIDS, SPEC, TWO_ROOTS, jagged, write_dataset
from tests.ranker.joined_rows import batch_of, first_rows
from tests.ranker.training import config_of

ALL_OPTIONS = {"heads": 2, "encoder_layers": 1, "pooling": "target"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return first_rows(write_dataset(tmp_path_factory.mktemp("model") / "dataset", rows_a_day=64))


def without_history(table: pa.Table, is_empty_B: list[bool]) -> pa.Table:
    """Return the table with the histories of some rows emptied."""
    for name in [name for name in table.column_names if name.startswith("history_")]:
        at, field = table.schema.get_field_index(name), table.schema.field(name)
        lists = [[] if empty else row for empty, row in zip(is_empty_B, table[name].to_pylist(), strict=True)]
        table = table.set_column(at, field, pa.array(lists, field.type))
    return table


@pytest.mark.parametrize("arm", ["none", "sid_ngram", "side"])
@pytest.mark.parametrize("history", [{}, ALL_OPTIONS])
@pytest.mark.parametrize("empty", ["some", "all"])
def test_empty_history_gives_zeros_and_training_stays_finite(
    world: World, rows: pa.Table, arm: str, history: dict[str, Any], empty: str
) -> None:
    config = config_of(arm, model={"history": history})
    features = arm_features(SPEC, config, SIDS)
    sharded = build_sharded(features, config, world, ModelConstants())
    is_empty_B = torch.arange(rows.num_rows) % (2 if empty == "some" else 1) == 0
    batch = to_ranker_batch(batch_of(without_history(rows, is_empty_B.tolist())), features)
    seen: list[Tensor] = []
    (block,) = (module for module in sharded.model.modules() if isinstance(module, HistoryBlock))
    block.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    for _ in range(2):
        sharded.optimizer.zero_grad()
        loss, _ = sharded.model(batch)
        loss.backward()
        sharded.optimizer.step()
    for history_BKD in seen:
        assert history_BKD[is_empty_B].abs().max() == 0
    assert loss.isfinite()
    assert all(parameter.isfinite().all() for parameter in block.parameters())


@pytest.mark.parametrize(("pooling", "expected"), [("pma", {"user_id", "item_id", "slot"}), ("target", {"item_id"})])
def test_target_attention_queries_with_the_item_alone(
    world: World, rows: pa.Table, pooling: str, expected: set[str]
) -> None:
    config = config_of("side", model={"history": {"pooling": pooling}})
    features = arm_features(SPEC, config, SIDS)
    sharded = build_sharded(features, config, world, ModelConstants())
    (block,) = (module for module in sharded.model.modules() if isinstance(module, HistoryBlock))
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))

    def history_of(table: pa.Table) -> Tensor:
        sharded.model(to_ranker_batch(batch_of(table), features))
        return seen.pop()

    before_BKD = history_of(rows)
    asked = set()
    for name in ("user_id", "item_id", "slot"):
        field = rows.schema.field(name)
        ones_N = np.ones(rows.num_rows, np.int64)
        other = jagged(4 * ones_N, ones_N) if name == "slot" else pa.array(7 * ones_N)
        changed = rows.set_column(rows.schema.get_field_index(name), field, other)
        if not torch.equal(history_of(changed), before_BKD):
            asked.add(name)
    assert asked == expected


def test_cross_equals_that_of_torchrec() -> None:
    theirs, ours = LowRankCrossNet(12, 3, 4), LowRankCross(12, 3, 4)
    ours.load_state_dict(theirs.state_dict())
    x_BN = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x_BN), theirs(x_BN))


def labelled(labels: list[list[int | None]], valid: list[bool]) -> RankerBatch:
    """Return a batch with nothing but labels and weights; None is an unknown label."""
    values: dict[str, Any] = {field.name: None for field in fields(RankerBatch)}
    labels_BT = torch.tensor([[float(label or 0) for label in row] for row in labels])
    is_known_BT = torch.tensor([[label is not None for label in row] for row in labels])
    weights_BT = (is_known_BT & torch.tensor(valid)[:, None]).float()
    return RankerBatch(**values | {"labels_BT": labels_BT, "weights_BT": weights_BT})


def slow_loss(
    tasks: dict[str, TaskSpec], is_given: bool, logits_BT: Tensor, labels: list[list[int | None]], valid: list[bool]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the loss row by row in float64, from probabilities, and each task's numbers of labels and positives."""
    names, loss, counts = list(tasks), torch.zeros(()).double(), []
    for task in names:
        chain = [task, *ancestors(tasks, task)]
        terms, positives = [], 0
        for b in (b for b, counts_for in enumerate(valid) if counts_for):
            own, *above = (labels[b][names.index(name)] for name in chain)
            if None in (own, *above) or (is_given and 0 in above):
                continue
            p, happened = torch.ones(()).double(), True
            for name in chain[:1] if is_given else chain:
                p = p * logits_BT[b, names.index(name)].double().sigmoid()
                happened = happened and labels[b][names.index(name)] == 1
            terms.append(-torch.log(p) if happened else -torch.log(1 - p))
            positives += happened
        loss = loss + tasks[task].weight * sum(terms) / max(len(terms), 1)
        counts.append((len(terms), positives))
    return loss, counts


@pytest.mark.parametrize("children", ["given", "entire_space"])
@pytest.mark.parametrize("tasks", [ONE_TASK, SPEC.tasks, CHAIN, TWO_ROOTS], ids=lambda tasks: "-".join(tasks))
def test_loss_and_gradients_match_a_slow_count(world: World, tasks: dict[str, TaskSpec], children: Any) -> None:
    torch.manual_seed(1)
    every = list(itertools.product((0, 1, None), repeat=len(tasks)))
    labels, valid = [list(row) for row in every], [number % 4 > 0 for number in range(len(every))]
    logits_BT = (2 * torch.randn(len(every), len(tasks))).requires_grad_()
    loss, output = GlobalLoss(tasks, children)(logits_BT, labelled(labels, valid))
    (ours,) = torch.autograd.grad(loss, logits_BT)
    expected, counts = slow_loss(tasks, children == "given", logits_BT, labels, valid)
    (theirs,) = torch.autograd.grad(expected, logits_BT)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert [tuple(each) for each in output.totals_3T[1:].t().int().tolist()] == counts
    torch.testing.assert_close(output.probabilities_BT, logits_BT.sigmoid())  # each task given its parent


def test_child_task_learns_from_its_parents_positives_or_from_all_known_rows(world: World) -> None:
    labels, valid = [[1, 1], [1, 0], [0, 0], [0, 0], [1, None], [0, None]], [True, True, True, False, True, True]
    tasks = {"click": TaskSpec(), "conversion": TaskSpec(given="click", weight=0.5)}
    logits_BT = torch.randn(6, 2)
    p_BT = logits_BT.sigmoid()
    click = binary_cross_entropy(p_BT[[0, 1, 2, 4, 5], 0], torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]))
    conversion = binary_cross_entropy(p_BT[:2, 1], torch.tensor([1.0, 0.0]))
    both = binary_cross_entropy(p_BT[:3].prod(1), torch.tensor([1.0, 0.0, 0.0]))
    batch = labelled(labels, valid)
    torch.testing.assert_close(GlobalLoss(tasks)(logits_BT, batch)[0], click + 0.5 * conversion)
    torch.testing.assert_close(GlobalLoss(tasks, "entire_space")(logits_BT, batch)[0], click + 0.5 * both)


def test_loss_of_a_long_chain_is_finite_and_exact_at_extreme_logits(world: World) -> None:
    for logit, label, expected in ((-50.0, 1, 150.0), (50.0, 1, 0.0), (50.0, 0, 50 - math.log(3)), (-50.0, 0, 0.0)):
        logits_BT = torch.full((1, 3), logit, requires_grad=True)
        batch = labelled([[label] * 3], [True])
        loss, output = GlobalLoss(CHAIN, "entire_space")(logits_BT, batch)
        loss.backward()
        assert output.totals_3T[0, 0].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)  # `order`, the last task
        assert logits_BT.grad is not None and logits_BT.grad.isfinite().all()


def test_task_weights_are_those_of_the_dataset_unless_configured() -> None:
    config = config_of("none", training={"task_weights": {"cart": 7.0}})
    tasks = arm_features(SPEC.model_copy(update={"tasks": CHAIN}), config, SIDS).tasks
    assert list(tasks) == ["order", "view", "cart"]
    assert GlobalLoss(tasks).task_weights_T.tolist() == [0.5, 1.0, 7.0]
    assert {name: task.given for name, task in tasks.items()} == {"order": "cart", "view": None, "cart": "view"}


@pytest.mark.parametrize(
    ("tasks", "weights", "error", "message"),
    [
        ({}, {}, DataError, "dataset.json: tasks: names none"),
        (CHAIN, {"click": 2.0}, ConfigError, "task_weights: 'click' is no task; tasks are order, view, cart"),
        ({"row": TaskSpec()}, {}, DataError, "tasks.row: must not be named as another column of the predictions"),
        ({"a": TaskSpec(), "p_a": TaskSpec()}, {}, DataError, "tasks.p_a: must not be named as another column"),
    ],
)
def test_invalid_tasks_are_refused(
    tasks: dict[str, TaskSpec], weights: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        config = config_of("none", training={"task_weights": weights})
        arm_features(SPEC.model_copy(update={"tasks": tasks}), config, SIDS)


@pytest.mark.parametrize("name", ["keys", "training", "share_memory"])
def test_a_task_named_as_an_attribute_of_torchs_modules_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"tasks.{name}: is an attribute of torch's modules"):
        Towers((name,), ModelConfig())


def test_joint_logit_is_exact_where_the_product_is_not() -> None:
    first_B = torch.tensor([0.3, -40.0, 60.0, -200.0, 200.0, 90.0], requires_grad=True)
    second_B = torch.tensor([-1.0, -40.0, 60.0, 200.0, 200.0, -90.0], requires_grad=True)
    joint_B = joint_logit(first_B, second_B)
    joint_B.sum().backward()
    p_B = first_B.detach()[:1].sigmoid() * second_B.detach()[:1].sigmoid()
    # Small p: log p is the sum of both log probabilities. Large p: 1 - p is the sum of both complements, here twice
    # e^-60.
    expected_B = [p_B.logit().item(), -80.0, 60.0 - torch.tensor(2.0).log().item(), -200.0, None, -90.0]
    for found, expected in zip(joint_B.tolist(), expected_B, strict=True):
        assert found == pytest.approx(expected, rel=1e-5) if expected is not None else found > 80
    assert first_B.grad is not None
    assert first_B.grad.isfinite().all()
    assert second_B.grad is not None
    assert second_B.grad.isfinite().all()
