"""A small materialized dataset: an events log whose clicks follow the items' content, with several sets of SIDs."""

import shutil
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from sidestack.encoder.sid.columns import event_columns, with_sid_metadata
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_codebook import write_codebook
from sidestack.infra.tables import (
    DatasetSpec,
    TaskSpec,
    ancestors,
    flat_schema,
    item_schema,
    request_schema,
    user_schema,
)
from tests.datasets import joined, write_snapshot_of

SPEC = DatasetSpec(
    embeddings={"words": 6, "behaviour": 4},
    categoricals={},
    user_categoricals={},
    num_items=300,
    num_users=60,
    tasks={"click": TaskSpec(), "conversion": TaskSpec(given="click")},
    dense=("rank", "price"),
    sparse={"slot": 5, "topics": 11},
    max_history=6,
    train=(date(2024, 1, 1), date(2024, 1, 4)),
    test=(date(2024, 1, 5), date(2024, 1, 6)),
    origin="made by the ranker's tests",
)

SID = SidSpec(
    quantizer="test",
    levels=3,
    digits=6,
    depth=3,
    groups=2,
    prefix_lengths=(2, 4, 6),
    steps=(1.0, 0.9, 0.5, 0.4, 0.2, 0.1),
    fingerprint="ab" * 32,
)

LINES = SidSpec(
    name="lines", quantizer="test", levels=3, lines=4, digits=4, depth=2, groups=2, prefix_lengths=(2,),
    fingerprint="cd" * 32,
)  # fmt: skip
"""Several lines per layer: the codebook beside the tables holds the vectors of its digits."""
CLUSTERS = SidSpec(
    name="clusters", quantizer="test", levels=1, lines=2**15, digits=6, depth=6, groups=1, fingerprint="ef" * 32
)
"""The numbers of the six nearest clusters, in two columns."""
SIDS = {sid.name: sid for sid in (SID, LINES, CLUSTERS)}
LATENT_DIM = 5

HABIT = SidSpec(
    name="habit", entity="user", quantizer="test", levels=3, digits=4, depth=2, groups=2, prefix_lengths=(2,),
    fingerprint="12" * 32,
)  # fmt: skip
"""SIDs of users, in the dataset that `write_dataset_with_users` writes."""
REQUEST_SPEC = SPEC.model_copy(
    update={"dense": ("rank",), "request_dense": ("price",), "sparse": {"slot": 5}, "request_sparse": {"topics": 11}}
)
"""Specification of the dataset whose requests have several impressions."""
USER_SPEC = SPEC.model_copy(update={"user_embeddings": {"activity": 4}})


ONE_TASK = {"like": TaskSpec()}
CHAIN = {"order": TaskSpec(given="cart", weight=0.5), "view": TaskSpec(), "cart": TaskSpec(given="view", weight=2.0)}
"""Three tasks, two of them given another; a child comes before its parent."""
TWO_ROOTS = {"like": TaskSpec(weight=3.0), "view": TaskSpec(), "cart": TaskSpec(given="view")}


def write_dataset(
    path: Path,
    sid: SidSpec | None = SID,
    rows_a_day: int = 512,
    null_share: float = 0.1,
    tasks: dict[str, TaskSpec] | None = None,
    impressions: int = 1,
) -> Path:
    """Write the six days of `SPEC` with all sets of SIDs, or none; the same arguments give the same bytes.

    Args:
        tasks: replace click and conversion. impressions: per request; more than 1 writes `REQUEST_SPEC`.
    """
    rng = np.random.default_rng(7)
    digits_ID = rng.integers(0, 3, (SPEC.num_items, 6))
    known_I = rng.random(SPEC.num_items) >= null_share
    sets = {} if sid is None else {**SIDS, "sid": sid}
    digits = {
        name: np.random.default_rng(8).integers(0, one.radix, (SPEC.num_items, one.digits))
        for name, one in sets.items()
    }
    digits |= {"sid": digits_ID}
    days = {}
    for day in all_days():
        table = events(rng, day, rows_a_day, digits_ID)
        if tasks is not None:
            table = with_tasks(table, tasks, digits_ID, day)
        if impressions > 1:
            table = in_requests(table, day, impressions)
        for name, one in sets.items():
            table = with_sids(table, one, digits[name], known_I)
        days[day] = table
    spec = SPEC if impressions == 1 else REQUEST_SPEC
    spec = spec if tasks is None else spec.model_copy(update={"tasks": tasks})
    write_snapshot_of(path, spec, [items()], [], days, sets.values())
    for name in sets.keys() & {"lines", "clusters"}:
        codewords = torch.randn(
            sets[name].digits, sets[name].radix, LATENT_DIM, generator=torch.Generator().manual_seed(1)
        )
        write_codebook(path, sets[name], codewords)
    return path


def items() -> pa.Table:
    """Draw the items' embeddings; every seventh item has no words, every eleventh no behaviour."""
    rng, item_I = np.random.default_rng(9), np.arange(SPEC.num_items)
    schema = item_schema(SPEC)
    columns = {"item_id": pa.array(item_I), "text": pa.nulls(SPEC.num_items, pa.string())}
    for (name, dim), every in zip(SPEC.embeddings.items(), (7, 11), strict=True):
        values = rng.normal(0, 0.1, (SPEC.num_items, dim)).astype(np.float16)
        rows = [None if i % every == 0 else list(row) for i, row in enumerate(values)]
        columns[name] = pa.array(rows, schema.field(name).type)
    return pa.table(columns, schema=schema)


def events(rng: np.random.Generator, day: date, rows: int, digits_ID: np.ndarray) -> pa.Table:
    """Draw one day's events; a click is more likely for items with a higher first digit."""
    start = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1e6)
    time_N = np.sort(start + rng.integers(0, 86_400_000_000, rows))
    item_N = rng.integers(0, SPEC.num_items, rows)
    click_N = rng.random(rows) < 0.1 + 0.3 * digits_ID[item_N, 0] / 2
    conversion_N = (rng.random(rows) < 0.4) & click_N
    lengths_N = rng.integers(0, SPEC.max_history + 1, rows)
    lengths_N[rng.random(rows) < 0.2] = 0
    history_T = rng.integers(0, SPEC.num_items, lengths_N.sum())
    gap_T = np.concatenate([np.sort(rng.integers(1, 10**12, n))[::-1] for n in lengths_N])
    topics_N = rng.integers(0, 4, rows)
    columns = {
        "event_time": pa.array(time_N, pa.timestamp("us")),
        "user_id": pa.array(rng.integers(0, SPEC.num_users, rows)),
        "item_id": pa.array(item_N),
        "click": pa.array(click_N.astype(np.int8)),
        "conversion": pa.array(conversion_N.astype(np.int8), mask=rng.random(rows) < 0.1),
        "rank": pa.array(rng.integers(1, 20, rows).astype(np.float32)),
        "price": pa.array(rng.normal(0, 3, rows).astype(np.float32)),
        "slot": jagged(rng.integers(0, 5, rows), np.ones(rows, int)),
        "topics": jagged(rng.integers(0, 11, topics_N.sum()), topics_N),
        "history_item_ids": jagged(history_T, lengths_N),
        "history_times": jagged(
            pa.array(np.repeat(time_N, lengths_N) - gap_T.astype(np.int64), pa.timestamp("us")), lengths_N
        ),
    }
    return pa.table({name: columns[name] for name in flat_schema(SPEC).names if name in columns})


def in_requests(table: pa.Table, day: date, impressions: int) -> pa.Table:
    """Group every `impressions` consecutive rows into a request that has the request columns of the first row."""
    first_N = np.arange(table.num_rows) // impressions * impressions
    for name in set(request_schema(REQUEST_SPEC).names) & set(table.column_names):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), table[name].take(pa.array(first_N)))
    ids = pa.array((day.toordinal() << 32) + first_N)
    return table.append_column(pa.field("request_id", pa.int64(), nullable=False), ids)


def with_tasks(table: pa.Table, tasks: dict[str, TaskSpec], digits_ID: np.ndarray, day: date) -> pa.Table:
    """Replace click and conversion by random labels of `tasks`; a tenth of each is null."""
    rng = np.random.default_rng(day.day)
    chance_N = 0.3 + 0.4 * digits_ID[table["item_id"].to_numpy(), 0] / 2
    drawn = {task: rng.random(len(chance_N)) < chance_N for task in tasks}
    table = table.drop_columns(["click", "conversion"])
    for task in tasks:
        happened_N = np.all([drawn[name] for name in (task, *ancestors(tasks, task))], axis=0)
        table = table.append_column(task, pa.array(happened_N.astype(np.int8), mask=rng.random(len(chance_N)) < 0.1))
    return table


def jagged(values_T: np.ndarray | pa.Array, lengths_N: np.ndarray) -> pa.ListArray:
    """Cut flat values into lists."""
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values_T))


def write_dataset_with_users(path: Path) -> Path:
    """Write the same dataset with embeddings and SIDs of users; every fifth user has neither."""
    plain = write_dataset(path.with_name(f"{path.name}-plain"))
    rng, known_U = np.random.default_rng(10), np.arange(SPEC.num_users) % 5 > 0
    schema = user_schema(USER_SPEC)
    activity_UD = rng.normal(0, 0.1, (SPEC.num_users, 4)).astype(np.float16)
    rows = [list(row) if known else None for row, known in zip(activity_UD, known_U, strict=True)]
    users = pa.table([range(SPEC.num_users), rows], schema=schema)
    digits_UD = rng.integers(0, HABIT.radix, (SPEC.num_users, HABIT.digits))
    days = {day: with_sids(joined(plain, None, day, day), HABIT, digits_UD, known_U) for day in all_days()}
    write_snapshot_of(path, USER_SPEC, [items()], [users], days, [*SIDS.values(), HABIT])
    shutil.copytree(plain / "codebooks", path / "codebooks")
    shutil.rmtree(plain)
    return path


def all_days() -> list[date]:
    """Return the six days of `SPEC`."""
    return [SPEC.train[0] + timedelta(days=n) for n in range((SPEC.test[1] - SPEC.train[0]).days + 1)]


def with_sids(table: pa.Table, sid: SidSpec, digits_ID: np.ndarray, known_I: np.ndarray) -> pa.Table:
    """Add every SID column of `sid`, from the digits of items or users; unknown ones have null SIDs."""
    history = table["history_item_ids"].combine_chunks()
    ids_N, history_T = table[f"{sid.entity}_id"].to_numpy(), history.flatten().to_numpy()
    lengths_N = history.value_lengths().to_numpy()
    for name, held in event_columns(sid).items():
        digits_IP = torch.from_numpy(digits_ID[:, : held.held_digits])
        ids_I = held.pack(digits_IP)[:, held.chunk].numpy()
        if name.startswith("history_"):
            values_T = pa.array(ids_I[history_T], mask=~known_I[history_T])
            column: pa.Array = jagged(values_T, lengths_N)
        else:
            column = pa.array(ids_I[ids_N], mask=~known_I[ids_N])
        table = table.append_column(with_sid_metadata(pa.field(name, column.type), held), column)
    return table
