"""Inspect an encoder's output for items: digits, items with a common prefix, nearest neighbours, loss of each signal.

    python -m encoder.inspect --encoder DIR --dataset DIR ITEM [ITEM ...]

ITEM is an `item_id`, or a `user_id` for an encoder of users. Neighbours are ranked by the cosine of the vectors h_hat
that digits decode to, before the decoder's networks. The whole table is encoded for this. An item that a later part
revises is compared by each of its rows.
"""

import argparse
import heapq
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from sidestack.encoder.bundle import EncoderBundle, load_bundle
from sidestack.encoder.newest import newest_signals
from sidestack.encoder.signals import SignalBatch, signal_batch, signal_check
from sidestack.infra.console import wide_console
from sidestack.infra.errors import DataError, SidestackError
from sidestack.infra.manifest import fetched
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.remote.urls import path_argument
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.stage import quiet

Integers = npt.NDArray[np.int64]
EXAMPLES = 5
"""Number of siblings and neighbours to name."""


@dataclass
class Sheet:
    """The findings for one item.

    Attributes:
        digits: of its SID, and the SID itself in its columns. losses: by signal that it has.
        siblings: by prefix length, the number of other items with the same prefix, and some of them.
        neighbours: (cosine, item), nearest first.
    """

    item: int
    digits: list[int]
    sid: list[int]
    losses: dict[str, float]
    siblings: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    neighbours: list[tuple[float, int]] = field(default_factory=list)


def inspect(bundle: EncoderBundle, dataset: Dataset, items: Sequence[int]) -> list[Sheet]:
    """Inspect some items, and search the whole table for similar ones.

    Raises:
        DataError: an item is not in the table or has no signal, or rows break the table's contract.
    """
    asked = _requested_signals(bundle, dataset, items)
    sheets = [_sheet(bundle, item, asked.sliced(row, row + 1)) for row, item in enumerate(items)]
    digits_QN = torch.tensor([sheet.digits for sheet in sheets])
    units_QH = _units(bundle, digits_QN)
    for ids_N, batch in _table(bundle, dataset):
        found_N = batch.any_present.numpy()
        with torch.inference_mode():
            digits_ND = bundle.model.digits(batch)
        cosine_QN = units_QH @ _units(bundle, digits_ND).T
        for place, sheet in enumerate(sheets):
            is_other_N = found_N & (ids_N != sheet.item)
            _add_siblings(sheet, ids_N, digits_ND, is_other_N, bundle)
            _add_neighbours(sheet, ids_N, cosine_QN[place].numpy(), is_other_N)
    return sheets


def _requested_signals(bundle: EncoderBundle, dataset: Dataset, items: Sequence[int]) -> SignalBatch:
    """Return the signals of the requested items."""
    batch = newest_signals(dataset, bundle.signals, np.array(items))
    for item, has_signal in zip(items, batch.any_present.tolist(), strict=True):
        if not has_signal:
            raise DataError(f"{bundle.signals.entity} {item}: has no signal, so its SID is null")
    return batch


def _table(bundle: EncoderBundle, dataset: Dataset) -> Iterator[tuple[Integers, SignalBatch]]:
    """Yield ids and signals of the whole table, one row group at a time."""
    signals = bundle.signals
    content = dataset.spec.content(signals.entity)
    check = signal_check(dataset.spec, signals.entity)
    for group in row_groups([file.path for file in dataset.content_files(signals.entity)]):
        table: pa.Table = read_row_group(group, (content.id_column, *signals.names))
        check(table, group)
        yield table[content.id_column].to_numpy(), signal_batch(table, signals)


@torch.inference_mode()
def _sheet(bundle: EncoderBundle, item: int, batch: SignalBatch) -> Sheet:
    model = bundle.model
    digits_1N = model.digits(batch)
    losses_K = model.row_losses(batch, model.reconstruct(digits_1N))[:, 0]
    losses = {
        name: float(loss) for name, loss in zip(model.signals.names, losses_K, strict=True) if bool(batch.present[name])
    }
    return Sheet(item, digits_1N[0].tolist(), bundle.spec.pack(digits_1N)[0].tolist(), losses)


@torch.inference_mode()
def _units(bundle: EncoderBundle, digits_ND: Tensor) -> Tensor:
    return normalize(bundle.model.quantizer.decode(digits_ND).float(), dim=1)


def _add_siblings(
    sheet: Sheet, ids_N: Integers, digits_ND: Tensor, is_other_N: npt.NDArray[np.bool_], bundle: EncoderBundle
) -> None:
    is_equal_ND = (digits_ND == torch.tensor(sheet.digits)).numpy()
    is_prefix_ND = np.logical_and.accumulate(is_equal_ND, axis=1)
    for length in range(bundle.spec.groups, bundle.spec.digits + 1, bundle.spec.groups):
        ids = ids_N[is_prefix_ND[:, length - 1] & is_other_N].tolist()
        number, some = sheet.siblings.get(length, (0, []))
        sheet.siblings[length] = (number + len(ids), [*some, *ids][:EXAMPLES])


def _add_neighbours(
    sheet: Sheet, ids_N: Integers, cosine_N: npt.NDArray[np.float32], is_other_N: npt.NDArray[np.bool_]
) -> None:
    places = np.flatnonzero(is_other_N)
    nearest = places[np.argsort(-cosine_N[places], kind="stable")[:EXAMPLES]]
    found = [(float(cosine_N[place]), int(ids_N[place])) for place in nearest]
    sheet.neighbours = heapq.nlargest(EXAMPLES, [*sheet.neighbours, *found], key=lambda one: one[0])


def _lines(sheet: Sheet, bundle: EncoderBundle) -> Iterator[Table | str]:
    spec = bundle.spec
    groups = [sheet.digits[at : at + spec.groups] for at in range(0, spec.digits, spec.groups)]
    digits = " | ".join(" ".join(map(str, group)) for group in groups)
    yield f"{spec.entity} {sheet.item}: SID {', '.join(map(str, sheet.sid))}, digits {digits}"
    table = Table("first digits", "others with them", "some of them", box=None, header_style="bold", pad_edge=False)
    for length, (number, some) in sheet.siblings.items():
        table.add_row(str(length), f"{number:,}", ", ".join(map(str, some)))
    yield table
    yield "nearest: " + ", ".join(f"{item} ({cosine:.3f})" for cosine, item in sheet.neighbours)
    yield "loss by signal: " + ", ".join(f"{name} {loss:.4f}" for name, loss in sheet.losses.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Print an encoder's output for some items."""
    parser = argparse.ArgumentParser(prog="python -m encoder.inspect", description="What an encoder makes of items.")
    parser.add_argument("--encoder", type=path_argument, required=True, help="the output of an encoder's stage")
    parser.add_argument("--dataset", type=path_argument, required=True, help="a snapshot that has the items")
    parser.add_argument("items", type=int, nargs="+", metavar="ITEM", help="ids to look at")
    arguments = parser.parse_args(argv)
    quiet()
    try:
        bundle = load_bundle(fetched(arguments.encoder), torch.device("cpu"))
        sheets = inspect(bundle, read_dataset(fetched(arguments.dataset)), arguments.items)
    except SidestackError as error:
        print(f"inspect: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    console = wide_console()
    for sheet in sheets:
        for part in _lines(sheet, bundle):
            console.print(part)


if __name__ == "__main__":
    main()
