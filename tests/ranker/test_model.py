"""The whole model on one rank: empty histories, what asks the history, and what the conversion tower learns from."""

from dataclasses import fields
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from infra.distributed import World
from ranker.batch import RankerBatch
from ranker.blocks import HistoryBlock
from ranker.features import arm_features
from ranker.frozen import Frozen
from ranker.model import GlobalLoss, joint_logit
from ranker.reader import to_ranker_batch
from ranker.sharding import build_sharded
from tests.ranker.dataset import SIDS, SPEC, jagged, write_dataset
from tests.ranker.test_reader import batch_of, first_rows
from tests.ranker.training import config_of

ALL_OPTIONS = {"heads": 2, "encoder_layers": 1, "pooling": "target"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return first_rows(write_dataset(tmp_path_factory.mktemp("model") / "dataset", rows_a_day=64))


def without_history(table: pa.Table, is_empty_B: list[bool]) -> pa.Table:
    """Take the histories of some rows away."""
    for name in [name for name in table.column_names if name.startswith("history_")]:
        at, field = table.schema.get_field_index(name), table.schema.field(name)
        lists = [[] if empty else row for empty, row in zip(is_empty_B, table[name].to_pylist(), strict=True)]
        table = table.set_column(at, field, pa.array(lists, field.type))
    return table


@pytest.mark.parametrize("arm", ["none", "sid_ngram", "side"])
@pytest.mark.parametrize("history", [{}, ALL_OPTIONS])
@pytest.mark.parametrize("empty", ["some", "all"])
def test_an_empty_history_gives_zeros_and_trains(
    world: World, rows: pa.Table, arm: str, history: dict[str, Any], empty: str
) -> None:
    config = config_of(arm, model={"history": history})
    features = arm_features(SPEC, config.content, SIDS)
    sharded = build_sharded(features, config, world, Frozen())
    is_empty_B = torch.arange(rows.num_rows) % 2 == 0 if empty == "some" else torch.ones(rows.num_rows, dtype=bool)
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
def test_target_attention_asks_by_the_ad_alone(world: World, rows: pa.Table, pooling: str, expected: set[str]) -> None:
    config = config_of("side", model={"history": {"pooling": pooling}})
    features = arm_features(SPEC, config.content, SIDS)
    sharded = build_sharded(features, config, world, Frozen())
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
        other = jagged([4] * rows.num_rows, [1] * rows.num_rows) if name == "slot" else pa.array([7] * rows.num_rows)
        changed = rows.set_column(rows.schema.get_field_index(name), field, other)
        if not torch.equal(history_of(changed), before_BKD):
            asked.add(name)
    assert asked == expected


def labelled(labels: list[list[float]], weights: list[list[float]]) -> RankerBatch:
    """Give a batch of which only the labels matter."""
    values: dict[str, Any] = {field.name: None for field in fields(RankerBatch)}
    return RankerBatch(**values | {"labels_BT": torch.tensor(labels), "weights_BT": torch.tensor(weights)})


LABELS = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
KNOWN = [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]  # the last: a click still in its follow-up


def test_conversion_learns_from_clicks_alone(world: World) -> None:
    logits_BT = torch.randn(5, 2)
    loss, output = GlobalLoss((1.0, 0.5))(logits_BT, labelled(LABELS, KNOWN))
    p_BT = logits_BT.sigmoid()
    click = binary_cross_entropy(p_BT[[0, 1, 2, 4], 0], torch.tensor([1.0, 1.0, 0.0, 1.0]))
    conversion = binary_cross_entropy(p_BT[:2, 1], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss, click + 0.5 * conversion)
    assert output.totals_3T[1:].tolist() == [[4, 2], [3, 1]]


def test_entire_space_learns_the_product_from_every_complete_row(world: World) -> None:
    logits_BT = torch.randn(5, 2)
    loss, output = GlobalLoss((1.0, 0.5), "entire_space")(logits_BT, labelled(LABELS, KNOWN))
    p_BT = logits_BT.sigmoid()
    click = binary_cross_entropy(p_BT[[0, 1, 2, 4], 0], torch.tensor([1.0, 1.0, 0.0, 1.0]))
    both = binary_cross_entropy(p_BT[:3].prod(1), torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(loss, click + 0.5 * both)
    assert output.totals_3T[1:].tolist() == [[4, 3], [3, 1]]
    torch.testing.assert_close(output.probabilities_BT, p_BT)  # still p(conversion | click)


def test_the_joint_logit_is_exact_where_the_product_is_not() -> None:
    first_B = torch.tensor([0.3, -40.0, 60.0, -200.0, 200.0, 90.0], requires_grad=True)
    second_B = torch.tensor([-1.0, -40.0, 60.0, 200.0, 200.0, -90.0], requires_grad=True)
    joint_B = joint_logit(first_B, second_B)
    joint_B.sum().backward()
    p_B = first_B.detach()[:1].sigmoid() * second_B.detach()[:1].sigmoid()
    # Small: log p is the sum of both. Large: 1 - p is the sum of both rests, e^-60 twice.
    expected_B = [p_B.logit().item(), -80.0, 60.0 - torch.tensor(2.0).log().item(), -200.0, None, -90.0]
    for found, expected in zip(joint_B.tolist(), expected_B, strict=True):
        assert found == pytest.approx(expected, rel=1e-5) if expected is not None else found > 80
    assert first_B.grad is not None
    assert first_B.grad.isfinite().all()
    assert second_B.grad is not None
    assert second_B.grad.isfinite().all()
