"""Time of the network in a training step, part by part, on the available device: `python -m benchmarks.step_parts`.

For a lent GPU: it needs torch and our packages, neither torchrec nor fbgemm, and takes under five minutes. Tables are
plain embeddings here, on the device, without an optimizer; exchange between ranks is not measured. `--quick` checks
that it runs.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, embedding

from sidestack.benchmarks.record import Row, markdown_table, print_table, results_folder, source, write_results
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.tables import DatasetSpec, TaskSpec
from sidestack.ranker.body import Body
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.features import ArmFeatures, arm_features
from sidestack.ranker.initial import fill_dense
from sidestack.ranker.inputs import ModelInputs, Vectors
from sidestack.ranker.layout import history_layout

ARMS = ("none", "side")
DAY = date(2024, 1, 1)
SPEC = DatasetSpec(
    embeddings={}, categoricals={}, user_categoricals={}, num_items=92_331, num_users=2_469,
    tasks={"click": TaskSpec(), "conversion": TaskSpec(given="click")},
    dense=tuple(f"dense_{n}" for n in range(33)), sparse={"display": 11, "mailer": 12}, max_history=1024,
    train=(DAY, DAY), test=(date(2024, 1, 2), date(2024, 1, 2)), origin="made up",
)  # fmt: skip
SID = SidSpec(quantizer="structured", levels=3, digits=15, depth=5, groups=3, steps=(1.0,) * 15, fingerprint="none")
COLUMNS = {
    "arm": "", "rows": ",d", "history": "d", "part": "", "ms": ".3f", "share_of_step": ".0%", "gb_a_second": ",.0f",
    "of_copy": ".0%",
}  # fmt: skip
WORDS = """
Medians of timed calls after a warm-up, the device waited for around each. "forward" and "step" (forward, loss,
backward, Adam) are of the network between looked-up vectors and logits; "history" is the history block within
"forward". "unpack x Omega" takes SIDs of histories to the model's width: 8 bytes an id are read, and 2 x 4 x d bytes
of the values it is added to are read and written; "of_copy" is that over what copying a tensor of those values takes.
Requests have 22 rows.
"""
IMPRESSIONS = 22


@dataclass(frozen=True)
class Sizes:
    """Rows per batch, entries of its histories, number of timed calls."""

    rows: tuple[int, ...]
    history: tuple[int, ...]
    calls: int


FULL, QUICK = Sizes((1024, 65_536), (32, 256), 30), Sizes((256,), (8,), 3)


class Trial:
    """A network with inputs of its own on a device."""

    def __init__(self, arm: str, rows: int, history: int, device: torch.device) -> None:
        self.config = RankerConfig(arm=arm).resolved()
        self.features: ArmFeatures = arm_features(SPEC, self.config, {"sid": SID})
        body = Body(self.features, self.config, ModelConstants())
        fill_dense(body, seed=0)
        self.body = body.to(device)
        self.optimizer = torch.optim.Adam(self.body.parameters(), fused=device.type == "cuda")
        self.inputs = inputs_of(self.features, rows, history, device)
        self.vectors = self._looked_up(rows, device)
        self.labels_BT = torch.rand(rows, 2, device=device).round()

    def _looked_up(self, rows: int, device: torch.device) -> Vectors:
        dim, requests = self.config.model.embedding_dim, len(self.inputs.history_lengths_R)
        entries = int(self.inputs.history_lengths_R.sum())

        def of(features: Sequence[str], number: int) -> dict[str, Tensor]:
            return {name: torch.randn(number, dim, device=device, requires_grad=True) for name in features}

        return Vectors(
            of([one.column for one in self.features.row_bags], rows),
            of([one.column for one in self.features.request_bags], requests),
            of([one.column for one in self.features.sequences], entries),
        )

    def forward(self) -> Tensor:
        """Return the logits."""
        logits_BT: Tensor = self.body(self.inputs, self.vectors)
        return logits_BT

    def step(self) -> None:
        """Run forward, loss, backward and Adam."""
        self.optimizer.zero_grad()
        torch.autograd.backward(binary_cross_entropy_with_logits(self.forward(), self.labels_BT))
        self.optimizer.step()


def inputs_of(features: ArmFeatures, rows: int, history: int, device: torch.device) -> ModelInputs:
    """Draw random inputs of `rows` rows, whose requests have `history` history entries."""
    requests = -(-rows // IMPRESSIONS)
    request_B = np.minimum(np.arange(rows) // IMPRESSIONS, requests - 1)
    lengths_R, entries = np.full(requests, history), requests * history
    layout = history_layout(lengths_R, np.bincount(request_B, minlength=requests))

    def moved(value: Tensor) -> Tensor:
        return value.to(device)

    def sids(number: int, columns: Sequence[str]) -> Tensor:
        return moved(torch.randint(3**15, (number, len(columns))))

    groups = tuple(type(group)(*map(moved, group)) for group in layout.groups)
    return ModelInputs(
        dense_BF=moved(torch.rand(rows, len(features.dense))),
        item_content_BC=sids(rows, features.item.columns),
        item_known_BS=moved(torch.ones(rows, len(features.item.known), dtype=torch.bool)),
        user_content_RC=sids(requests, features.user.columns),
        user_known_RS=moved(torch.ones(requests, len(features.user.known), dtype=torch.bool)),
        history_content_TC=sids(entries, features.history.columns),
        history_known_TS=moved(torch.ones(entries, len(features.history.known), dtype=torch.bool)),
        history_recency_FT=moved(torch.rand(3, entries)),
        history_lengths_R=moved(torch.from_numpy(lengths_R)),
        request_B=moved(torch.from_numpy(request_B)),
        layout=type(layout)(groups, moved(layout.place_B), moved(layout.place_T)),
    )


def measured(arm: str, rows: int, history: int, calls: int, device: torch.device) -> list[Row]:
    """Time the parts of one network's step."""
    trial = Trial(arm, rows, history, device)
    entries = int(trial.inputs.history_lengths_R.sum())
    table_ND = torch.randn(SPEC.num_items, trial.config.model.embedding_dim, device=device)
    ids_T = torch.randint(SPEC.num_items, (entries,), device=device)
    seconds = {
        "lookup of the history": _timed(lambda: embedding(ids_T, table_ND), calls, device),
        "history": _timed(_history_of(trial), calls, device),
        "forward": _timed(trial.forward, calls, device),
        "step": _timed(trial.step, calls, device),
    }
    values_TD = torch.randn(entries, trial.config.model.embedding_dim, device=device)
    copy = _timed(values_TD.clone, calls, device)
    content = trial.body.history.content
    if content is not None:
        with torch.inference_mode():
            held_TD = values_TD.clone()
            seconds["unpack x Omega"] = _timed(lambda: content(held_TD, trial.inputs, {}), calls, device)
    made: list[Row] = []
    for part, taken in seconds.items():
        row: Row = {"arm": arm, "rows": rows, "history": history, "part": part, "ms": taken * 1e3}
        row = {**row, "share_of_step": taken / seconds["step"]}
        if part == "unpack x Omega":
            size = entries * 8 + 2 * values_TD.nbytes
            copied = 2 * values_TD.nbytes / copy
            row = {**row, "gb_a_second": size / taken / 1e9, "of_copy": size / taken / copied}
        made.append(row)
    return made


def _history_of(trial: Trial) -> Callable[[], object]:
    """Return a call of the history block with the network's attention query."""
    held: list[tuple[object, ...]] = []
    hook = trial.body.history.register_forward_pre_hook(lambda _, arguments: held.append(arguments))
    trial.forward()
    hook.remove()
    return lambda: trial.body.history(*held[0])


def _timed(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the median seconds of a call, with the device synchronized before and after."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for _ in range(calls + max(calls // 5, 2)):
        wait()
        began = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[-calls:]))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_parts", description="Parts of a training step.")
    parser.add_argument("--quick", action="store_true", help="one small batch and few calls, to see that it runs")
    parser.add_argument("--out", type=Path, help="where step_parts.json and step_parts.md go")
    arguments = parser.parse_args(argv)
    out, sizes = results_folder(arguments.out, quick=arguments.quick), QUICK if arguments.quick else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = [
        row
        for arm in ARMS
        for number in sizes.rows
        for history in sizes.history
        for row in measured(arm, number, history, sizes.calls, device)
    ]
    print_table("Parts of a step", rows, COLUMNS)
    write_results("step_parts", rows, packages=["torch"], out=out)
    parts = ["# Parts of a training step", WORDS.strip(), source(["torch"]), markdown_table(rows, COLUMNS)]
    (out / "step_parts.md").write_text("\n\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
