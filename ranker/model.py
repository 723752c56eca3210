"""The ranking model: tables, the dense network over them, and a loss that is the same for any number of ranks."""

from collections.abc import Mapping
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from sidestack.infra.lane import Batch
from sidestack.infra.tables import TaskSpec, ancestors
from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.body import Body
from sidestack.ranker.config import Children, RankerConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.id_feature import IdFeature
from sidestack.ranker.inputs import Vectors


class StepOutput(NamedTuple):
    """The results of one step beside the loss.

    Attributes:
        probabilities_BT: float32, of this rank's rows, by task.
        totals_3T: float64, over all ranks: sum of log losses, number of labels, number of positives, by task. In
            training the sum of losses is only this rank's until the optimizer steps (`GlobalLoss.take_unsummed`).
        source: see `RankerBatch`.
    """

    probabilities_BT: Tensor
    totals_3T: Tensor
    source: Batch | None


class GlobalLoss(nn.Module):
    """Log loss averaged over the labels of the global batch.

    Gradients are averaged over ranks. Each rank's loss is therefore `world size * its own sum / the global number of
    labels`; the average over ranks is the mean over the global batch, however its rows are spread. The global number is
    known when rows are read, and comes with the batch. In training, the losses are summed with the gradients.

    Args of the constructor:
        tasks: by name, in the order of the logits; the logit of a task with a parent is that of p(task | parent = 1).
        children: which rows tasks with a parent learn from (`ranker.config.TrainingConfig`).
    """

    task_weights_T: Tensor

    def __init__(self, tasks: Mapping[str, TaskSpec], children: Children = "given") -> None:
        super().__init__()
        places = {task: place for place, task in enumerate(tasks)}
        self.in_entire_space = children == "entire_space"
        # For each task the places of its ancestors, root first, and its own.
        self.chains = [[places[name] for name in (*ancestors(tasks, task)[::-1], task)] for task in tasks]
        weights = [task.weight for task in tasks.values()]
        self.register_buffer("task_weights_T", torch.tensor(weights), persistent=False)
        self._unsummed_T: Tensor | None = None

    def counts(self, batch: RankerBatch) -> Tensor:
        """Return the number of a batch's labels in the loss, and of positives among them, by task: float64 [2, T]."""
        labels_BT, weights_BT = self._loss_labels(batch)
        return torch.stack([weights_BT.sum(0), (labels_BT * weights_BT).sum(0)]).double()

    def take_unsummed(self) -> Tensor | None:
        """Return the losses in the last step's `totals_3T`, to be summed over ranks in place; None once taken."""
        taken, self._unsummed_T = self._unsummed_T, None
        return taken

    def forward(self, logits_BT: Tensor, batch: RankerBatch) -> tuple[Tensor, StepOutput]:
        """Return this rank's loss to differentiate, and the step's output, without a GPU synchronization."""
        labels_BT, weights_BT = self._loss_labels(batch)
        losses_BT = (
            binary_cross_entropy_with_logits(self._loss_logits(logits_BT), labels_BT, reduction="none") * weights_BT
        )
        sums_T = losses_BT.sum(0)
        world_size = dist.get_world_size()
        assert batch.counts_2T is not None or world_size == 1, "the counts of a part are not those of the global batch"
        counts_2T = self.counts(batch) if batch.counts_2T is None else batch.counts_2T
        totals_3T = torch.cat([sums_T.detach().double().unsqueeze(0), counts_2T])
        if self.training:
            self._unsummed_T = totals_3T[0]
        elif world_size > 1:
            dist.all_reduce(totals_3T[0])
        loss = world_size * (self.task_weights_T * sums_T / counts_2T[0].clamp(min=1.0).float()).sum()
        return loss, StepOutput(logits_BT.detach().sigmoid(), totals_3T, batch.source)

    def _loss_logits(self, logits_BT: Tensor) -> Tensor:
        """Return the logits that enter the loss."""
        if not self.in_entire_space:
            return logits_BT
        joint = [reduce(joint_logit, [logits_BT[:, i] for i in chain]) for chain in self.chains]
        return torch.stack(joint, dim=1)

    def _loss_labels(self, batch: RankerBatch) -> tuple[Tensor, Tensor]:
        """Return the labels that enter the loss, and weights: 1 where a label counts, else 0."""
        labels_BT, weights_BT = batch.labels_BT, batch.weights_BT
        if not self.in_entire_space:  # an ancestor's label that is not known is 0
            asked = [[weights_BT[:, own], *(labels_BT[:, i] for i in above)] for *above, own in self.chains]
            return labels_BT, torch.stack([reduce(torch.mul, each) for each in asked], dim=1)
        happened = [reduce(torch.mul, [labels_BT[:, i] for i in chain]) for chain in self.chains]
        known = [reduce(torch.mul, [weights_BT[:, i] for i in chain]) for chain in self.chains]
        return torch.stack(happened, dim=1), torch.stack(known, dim=1)


def joint_logit(first_B: Tensor, second_B: Tensor) -> Tensor:
    """Return the logit of the product of two probabilities given as logits, to full precision at both ends.

    With p = s(a) s(b), log p = log s(a) + log s(b) and log(1 - p) = log(s(-a) + s(a) s(-b)).
    """
    log_first_B = logsigmoid(first_B)
    log_neither_B = torch.logaddexp(logsigmoid(-first_B), log_first_B + logsigmoid(-second_B))
    return log_first_B + logsigmoid(second_B) - log_neither_B


class LookupResults(nn.Module):
    """The unpacking of torchrec's results; a module, so that the pipeline does not trace into it."""

    def forward(self, bags: KeyedTensor, request_bags: KeyedTensor, sequences: dict[str, JaggedTensor]) -> Vectors:
        """Return the vectors by feature: their order depends on the sharding."""
        of_entry = {name: sequence.values() for name, sequence in sequences.items()}
        return Vectors(bags.to_dict(), request_bags.to_dict(), of_entry)


class Ranker(nn.Module):
    """The tasks' probabilities from ids, context, history and, by arm, Semantic IDs (SIDE paper, section 5).

    `forward` stays plain: the training pipeline traces it to find the tables and each table's input in the batch.

    Args of the constructor:
        features: what the arm reads and looks up.
        config: the arm's resolved configuration.
        device: of everything but the tables, which stay on the meta device until they are sharded.
        constants: the constants that its content needs.
    """

    def __init__(
        self, features: ArmFeatures, config: RankerConfig, device: torch.device, constants: ModelConstants
    ) -> None:
        super().__init__()
        dim, meta = config.model.embedding_dim, torch.device("meta")
        self.bags = EmbeddingBagCollection(
            device=meta,
            tables=[EmbeddingBagConfig(**_table(feature, dim)) for feature in features.row_bags],
        )
        self.request_bags = EmbeddingBagCollection(
            device=meta,
            tables=[EmbeddingBagConfig(**_table(feature, dim)) for feature in features.request_bags],
        )
        self.sequences = EmbeddingCollection(
            device=meta,
            tables=[EmbeddingConfig(**_table(feature, dim)) for feature in features.sequences],
        )
        self.looked_up = LookupResults()
        self.body = Body(features, config, constants).to(device)
        self.loss = GlobalLoss(features.tasks, config.training.children).to(device)

    def forward(self, batch: RankerBatch) -> tuple[Tensor, StepOutput]:
        """Return the loss and the step's output; see `GlobalLoss`."""
        bags = self.bags(batch.bags)
        request_bags = self.request_bags(batch.request_bags)
        sequences = self.sequences(batch.sequences)
        vectors = self.looked_up(bags, request_bags, sequences)
        result: tuple[Tensor, StepOutput] = self.loss(self.body(batch, vectors), batch)
        return result

    @property
    def collections(self) -> tuple[nn.Module, ...]:
        """The collections of embedding tables."""
        return (self.bags, self.request_bags, self.sequences)


def _table(feature: IdFeature, dim: int) -> dict[str, object]:
    return {
        "name": feature.table,
        "feature_names": [feature.column],
        "num_embeddings": feature.rows,
        "embedding_dim": dim,
        "init_fn": nn.init.zeros_,  # `ranker.initial` fills them, the same for any sharding
    }
