"""What a trained ranker is made of and what it listens to: its tables, and how much worse it is without each input.

    python -m ranker.inspect --model DIR --dataset DIR [--rows N]

An input's importance is the rise in normalized entropy when its values are shuffled over held-out rows: an impression's
columns over the impressions, a request's columns over the requests.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.table import Table

from sidestack.infra.console import wide_console
from sidestack.infra.errors import SidestackError
from sidestack.infra.manifest import fetched
from sidestack.infra.remote.urls import path_argument
from sidestack.infra.rows import Rows, concatenated
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.stage import quiet
from sidestack.infra.tables import read_json
from sidestack.infra.take import take_rows
from sidestack.ranker.body import Body
from sidestack.ranker.bundle import RankerBundle, open_bundle
from sidestack.ranker.bundle_description import require_sids, require_trained_columns
from sidestack.ranker.constants import read_constants
from sidestack.ranker.features import HISTORY_COLUMNS, ArmFeatures, dataset_sids
from sidestack.ranker.metrics import judged_label, log_loss_ne
from sidestack.ranker.serving.network import LocalNetwork
from sidestack.ranker.serving.tables import ServedTable
from sidestack.ranker.spans import open_impressions

Labels = npt.NDArray[np.float32]
BLOCK_ROWS = 1 << 13
_, HISTORY_TIMES = HISTORY_COLUMNS


@dataclass(frozen=True)
class Input:
    """Columns that are shuffled together."""

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Importance:
    """How much normalized entropy rises, by task, when an input is shuffled, relative to the unshuffled value."""

    name: str
    rise: dict[str, float]


def inputs_of(features: ArmFeatures) -> list[Input]:
    """Return an arm's inputs: blocks of columns that belong together, and every other column by itself."""
    ids = [feature.column for feature in features.ids]
    found = []
    for content in (features.item, features.user):
        tables = [column for one in content.tables for column in one.columns]
        columns = dict.fromkeys([*tables, *content.columns, *content.known])
        # A row's own id is an input of its own, although `dense` content is looked up by it.
        found.append(Input(f"{content.position}'s content", tuple(column for column in columns if column not in ids)))
    history = Input("history", tuple(dict.fromkeys([*features.sequence_columns, *HISTORY_COLUMNS])))
    found += [history, Input("all dense columns", features.dense)]
    found += [Input(name, (name,)) for name in (*ids, *features.dense)]
    return [one for one in found if one.columns]


def importances(network: LocalNetwork, rows: Rows, seed: int = 0) -> tuple[dict[str, float], list[Importance]]:
    """Return normalized entropy by task, and the importance of each input, largest first.

    Args:
        network: the ranker's. rows: held-out rows. seed: seeds the shuffling.
    """
    features = network.features
    labels = {task: _labels(rows.own, features, task) for task in features.tasks}
    whole = _entropies(network, rows, labels)
    found = []
    for one in inputs_of(features):
        shuffled = _entropies(network, shuffle(rows, one.columns, np.random.default_rng(seed)), labels)
        found.append(Importance(one.name, {task: shuffled[task] / whole[task] - 1 for task in whole}))
    first = next(iter(whole))
    return whole, sorted(found, key=lambda one: -one.rise[first])


def shuffle(rows: Rows, columns: Sequence[str], rng: np.random.Generator) -> Rows:
    """Return rows with some columns shuffled, all in the same order: over rows, or over requests for request columns.

    The entries of a shuffled history keep their age relative to the request.
    """
    assert rows.shared is not None
    own = [name for name in columns if name in rows.own.column_names]
    shared = [name for name in columns if name not in own]
    order_N, order_R = rng.permutation(rows.own.num_rows), rng.permutation(rows.shared.num_rows)
    moved = _permute_columns(rows.shared, shared, order_R)
    if HISTORY_TIMES in shared:
        at = moved.schema.get_field_index(HISTORY_TIMES)
        moved = moved.set_column(at, moved.schema.field(at), _shift_history_times(rows.shared, order_R))
    return replace(rows, own=_permute_columns(rows.own, own, order_N), shared=moved)


def _permute_columns(table: pa.Table, columns: Sequence[str], order_N: npt.NDArray[np.int64]) -> pa.Table:
    """Return a table with the values of some columns reordered."""
    moved = take_rows(table.select(columns), order_N)
    for name in columns:
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), moved[name])
    return table


def _shift_history_times(requests: pa.Table, order_R: npt.NDArray[np.int64]) -> pa.Array:
    """Return the reordered times of histories, shifted by the difference of the requests' times."""
    time_R = requests["event_time"].cast(pa.int64()).to_numpy()
    lists = take_rows(requests.select([HISTORY_TIMES]), order_R)[HISTORY_TIMES].combine_chunks()
    apart_T = np.repeat(time_R - time_R[order_R], lists.value_lengths().to_numpy())
    times_T = pa.array(lists.flatten().cast(pa.int64()).to_numpy() + apart_T).cast(lists.type.value_type)
    offsets_R1 = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets_R1), times_T, type=lists.type)


def _labels(own: pa.Table, features: ArmFeatures, task: str) -> Labels:
    label: Labels = judged_label(own, features.tasks, task).cast(pa.float32()).to_numpy(zero_copy_only=False)
    return label


def _entropies(network: LocalNetwork, rows: Rows, labels: dict[str, Labels]) -> dict[str, float]:
    starts = range(0, rows.num_rows, BLOCK_ROWS)
    p_NT = np.concatenate([network.probabilities(rows.slice(at, min(BLOCK_ROWS, rows.num_rows - at))) for at in starts])
    return {task: log_loss_ne(p_NT[:, place], label_N) for place, (task, label_N) in enumerate(labels.items())}


def read_rows(dataset: Dataset, bundle: RankerBundle, number: int) -> Rows:
    """Read about `number` held-out rows, spread over their dates by whole row groups."""
    described = bundle.description
    features = bundle.features(dataset.spec)
    holdout = described.config.holdout
    dates = holdout.windows(described.spec)[1]
    source = open_impressions(dataset, dates, holdout.measured_labels, features.columns)
    groups = source.groups(0, source.num_rows)
    step = max(1, source.num_rows // number)
    return concatenated([source.read(group) for group in groups[::step]]).in_one_chunk()


def open_network(bundle: RankerBundle, dataset: Dataset) -> LocalNetwork:
    """Load a ranker's network and tables into this process's memory."""
    features = bundle.features(dataset.spec)
    network, tables = bundle.weights()
    body = Body(features, bundle.description.config, read_constants(dataset, features.constants))
    body.load_state_dict(network)
    return LocalNetwork(features, body, {name: ServedTable({"rows": rows_ND}) for name, rows_ND in tables.items()})


def _tables(path: Path, bundle: RankerBundle) -> Table:
    plan = read_json(path / "plan.json")["tables"]
    table = Table(
        "table", "rows", "bytes", "sharding", "kernel", "parts", box=None, header_style="bold", pad_edge=False
    )
    dim = bundle.description.config.model.embedding_dim
    for name, rows in sorted(bundle.description.rows.items(), key=lambda one: -one[1]):
        own = plan.get(name, {})
        parts = str(len(own.get("shards", [])))
        table.add_row(name, f"{rows:,}", f"{4 * dim * rows:,}", own.get("sharding", ""), own.get("kernel", ""), parts)
    return table


def _importance_table(whole: dict[str, float], found: Sequence[Importance]) -> Table:
    table = Table("input", *(f"{task} NE rises by" for task in whole), box=None, header_style="bold", pad_edge=False)
    for one in found:
        table.add_row(one.name, *(f"{100 * one.rise[task]:+.2f} %" for task in whole))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Print a ranker's tables and the importance of its inputs."""
    parser = argparse.ArgumentParser(prog="python -m ranker.inspect", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", type=path_argument, required=True, help="the output of a ranker's stage")
    parser.add_argument("--dataset", type=path_argument, required=True, help="the snapshot it was trained on")
    parser.add_argument("--rows", type=int, default=50_000, help="about how many held-out rows are shuffled")
    arguments = parser.parse_args(argv)
    quiet()
    console = wide_console()
    try:
        for part in _report(arguments.model, arguments.dataset, arguments.rows):
            console.print(part)
    except SidestackError as error:
        print(f"inspect: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _report(path: Path, dataset_path: Path, number: int) -> Iterator[Table | str]:
    bundle, dataset = open_bundle(fetched(path)), read_dataset(fetched(dataset_path))
    described = bundle.description
    require_trained_columns(described, dataset.spec, f"dataset={dataset_path}")
    require_sids(described, dataset_sids(dataset), f"dataset={dataset_path}")
    sids = ", ".join(f"{name} {spec.fingerprint[:12]}" for name, spec in described.sids.items()) or "none"
    yield f"arm {described.config.arm}; SIDs: {sids}; trained on {described.spec.train[0]} to {described.spec.train[1]}"
    yield _tables(path, bundle)
    rows = read_rows(dataset, bundle, number)
    whole, found = importances(open_network(bundle, dataset), rows)
    yield f"{rows.num_rows:,} held-out rows: " + ", ".join(f"{task} NE {value:.4f}" for task, value in whole.items())
    yield _importance_table(whole, found)


if __name__ == "__main__":
    main()
