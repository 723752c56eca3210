"""The dry run: the plan that a training would make, its communication cost, and a clear error when nothing fits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sidestack.infra.distributed import World
from sidestack.infra.errors import ConfigError
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.exchange import count_sent
from sidestack.ranker.features import arm_features
from sidestack.ranker.plan import Workload, dry_run, main
from sidestack.ranker.planner import (
    GIB,
    Cluster,
    NoPlanError,
    PlannedShard,
    PlannedTable,
    TablePlan,
    Traffic,
    plan_tables,
    unsharded_model,
)
from sidestack.ranker.preparation import open_splits
from sidestack.ranker.sharding import COLLECTIONS, build_sharded
from tests.datasets import joined
from tests.distributed import run_distributed
from tests.ranker.dataset import SID, SPEC, write_dataset
from tests.ranker.training import config_of, run_steps

ROOT = Path(__file__).parents[2]
LARGE = ("item_id", "history_item_ids", "user_id")
EIGHT = Cluster("cuda", 8, 8, 80 * GIB, 128 * GIB)


def workload(arm: str, rows: int = 0, **sections: dict[str, Any]) -> Workload:
    """Return an arm on the tests' dataset, with `rows` ids in each of its three largest id spaces."""
    config = config_of(arm, **sections)
    spec = SPEC.model_copy(update={"num_items": rows, "num_users": rows}) if rows else SPEC
    return Workload(config, arm_features(spec, config, {"sid": SID}), ModelConstants(), Traffic(3.0), None, None)


def plan_of(work: Workload, cluster: Cluster) -> TablePlan:
    model = unsharded_model(work.features, work.config, torch.device("meta"), work.constants)
    return plan_tables(model, work.features, work.config, cluster, work.traffic)


def test_a_billion_rows_fit_on_eight_gpus_in_shards_that_cover_the_table() -> None:
    plan = plan_of(workload("sid_ngram", 10**9, model={"embedding_dim": 32}), EIGHT)
    tables = {table.name: table for table in plan.tables}
    assert {f"t_{column}" for column in LARGE} < tables.keys()
    for column in LARGE:
        table = tables[f"t_{column}"]
        assert (table.rows, table.sharding, table.kernel) == (10**9, "row_wise", "fused")
        assert sorted(shard.offset[0] for shard in table.shards) == list(range(0, 10**9, 125_000_000))
        assert sum(shard.size[0] for shard in table.shards) == 10**9
    used_R2 = plan.rank_bytes()
    raw = sum(table.bytes for table in plan.tables)
    assert raw == pytest.approx(used_R2.sum(), rel=1e-3)  # the buffers of a step are negligible
    assert used_R2[:, 0].max() < 0.85 * EIGHT.device_bytes
    assert used_R2[:, 1].max() == 0


def test_host_memory_behind_a_cache_is_used_when_gpus_are_short() -> None:
    four = Cluster("cuda", 4, 4, 80 * GIB, 200 * GIB)
    plan = plan_of(workload("none", 10**9, model={"embedding_dim": 32}), four)
    kernels = {table.kernel for table in plan.tables}
    assert kernels == {"fused", "fused_uvm_caching"}
    assert (plan.rank_bytes() <= [0.85 * 80 * GIB, 200 * GIB]).all()


def test_error_names_which_memory_is_short_and_by_how_much() -> None:
    work = workload("none", 10**9, model={"embedding_dim": 32})
    two = Cluster("cuda", 2, 2, 80 * GIB, 100 * GIB)
    with pytest.raises(NoPlanError) as refused:
        plan_of(work, two)
    text = str(refused.value)
    need = 3 * 10**9 * 33 * 4 / GIB  # weights, and one optimizer state per row
    assert need == pytest.approx(368.8, abs=0.1)
    assert "no plan for 358 GiB of tables on 2 ranks:" in text
    assert "fused: needs 369 GiB of GPU memory, the ranks may fill 136 GiB: short by 233 GiB" in text
    assert "needs 369 GiB of host memory, the ranks may fill 200 GiB: short by 169 GiB" in text
    whole = workload("none", 10**9, model={"embedding_dim": 32}, sharding={"types": ["table_wise"]})
    with pytest.raises(NoPlanError, match=r"t_item_id: its largest part is 42\.9 GiB more than one rank may fill"):
        plan_of(whole, Cluster("cpu", 8, 8, 0, 80 * GIB))
    nowhere = workload("none", sharding={"types": ["table_row_wise"]})
    with pytest.raises(ConfigError, match=r"ranker\.sharding\.types: table_row_wise: not on cuda"):
        plan_of(nowhere, EIGHT)


def test_plan_does_not_depend_on_the_order_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrec.distributed.planner.enumerators import EmbeddingEnumerator

    plans = []
    kept = EmbeddingEnumerator._filter_sharding_types
    for backwards in (False, True):
        monkeypatch.setattr(
            EmbeddingEnumerator,
            "_filter_sharding_types",
            lambda self, *args, backwards=backwards: sorted(kept(self, *args), reverse=backwards),
        )
        plans.append(plan_of(workload("sid_ngram"), Cluster("cuda", 2, 2, GIB, GIB)).tables)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
@pytest.mark.parametrize("is_pooled", [True, False])
def test_bytes_sent_match_a_slow_count_of_every_id(sharding: str, is_pooled: bool) -> None:
    rows, dim, batch, ids, ranks = 12, 8, 10, 3, 4
    cuts = {
        "table_wise": [(0, (0, 0), (rows, dim))],
        "row_wise": [(rank, (3 * rank, 0), (3, dim)) for rank in range(ranks)],
        "column_wise": [(1, (0, 0), (rows, 4)), (2, (0, 4), (rows, 4))],
    }[sharding]
    shards = tuple(PlannedShard(rank, offset, size, 0, 0) for rank, offset, size in cuts)
    table = PlannedTable("t", rows, dim, batch, ids, is_pooled, sharding, "fused", shards)
    expected = {"ids_R": [0.0] * ranks, "forward_R": [0.0] * ranks, "backward_R": [0.0] * ranks}
    for asker in range(ranks):
        for rank, (first, _), (height, width) in cuts:
            if rank == asker:
                continue
            # The batch's ids are spread evenly over the table's rows; those in the shard are requested from its rank.
            asked = sum(batch * ids / rows for row in range(rows) if first <= row < first + height)
            expected["ids_R"][asker] += 8 * asked + 8 * batch
            vectors = batch if is_pooled else asked
            expected["forward_R"][rank] += 4 * width * vectors
            expected["backward_R"][asker] += 4 * width * vectors
    for name, values_R in count_sent(table, ranks)._asdict().items():
        assert values_R.tolist() == pytest.approx(expected[name]), name


@pytest.mark.parametrize("types", [["table_wise", "row_wise"], ["column_wise"]])
def test_reported_formulas_evaluate_to_the_reported_bytes(types: list[str]) -> None:
    dim = {"embedding_dim": 256 if types == ["column_wise"] else 8}
    report = dry_run(workload("sid_ngram", 10**5, model=dim, sharding={"types": types}), EIGHT)
    tables = report["exchange"]["tables"]
    for own in tables.values():
        assert eval(own["ids_sum"].replace("x", "*")) == pytest.approx(own["ids"])
        assert eval(own["vectors_sum"].replace("x", "*")) == pytest.approx(own["forward"] + own["backward"])
    total = sum(own["ids"] + own["forward"] + own["backward"] for own in tables.values())
    assert report["exchange"]["rank_bytes_mean"] == pytest.approx(total)


def planned_and_sent(world: World, dataset: Path, traffic: Traffic) -> tuple[TablePlan, list[tuple[str, int]]]:
    """Train for some steps; return the plan of the training, and the bytes that this rank sends to others."""
    config = config_of("none")
    fitting, _ = open_splits(read_dataset(dataset), config)
    plan = build_sharded(fitting.features, config, world, ModelConstants(), traffic).plan
    noted: list[tuple[str, int]] = []
    send = dist.all_to_all_single

    def note(
        output: Tensor, input: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None,
        group: Any = None, async_op: bool = False,
    ) -> Any:  # fmt: skip
        sizes = input_split_sizes
        if sizes is not None:  # None for the few numbers that announce a message's length
            kept = sizes[world.rank] / max(sum(sizes), 1) * input.numel()
            noted.append((str(input.dtype), round(input.numel() - kept) * input.element_size()))
        return send(output, input, output_split_sizes, sizes, group, async_op)

    dist.all_to_all_single = note
    run_steps(world, dataset, config, 20)
    return plan, noted


@pytest.mark.parametrize("impressions", [1, 4])
def test_training_uses_the_plan_of_the_dry_run_and_sends_its_bytes(tmp_path: Path, impressions: int) -> None:
    dataset = write_dataset(tmp_path / "dataset", impressions=impressions)
    config = config_of("none")
    fitting, _ = open_splits(read_dataset(dataset), config)
    rows = joined(dataset, None, *SPEC.train)
    mean, topics = (len(rows[name].combine_chunks().flatten()) / len(rows) for name in ("history_item_ids", "topics"))
    traffic = Traffic(mean, 1 / impressions)
    (plan, first), (_, second) = run_distributed(planned_and_sent, dataset, traffic)
    host = plan.cluster.host_bytes
    dry = plan_of(
        Workload(config, fitting.features, ModelConstants(), traffic, None, None), Cluster("cpu", 2, 2, 0, host)
    )
    assert dry.tables == plan.tables
    lookups = {table.name: table.lookups for table in plan.tables}
    of_request = {"t_user_id", "t_history_item_ids"} | ({"t_topics"} if impressions > 1 else set())
    assert lookups == {name: plan.batch_size // (impressions if name in of_request else 1) for name in lookups}
    tables = [count_sent(replace(t, ids=topics) if t.name == "t_topics" else t, 2) for t in plan.tables]
    for rank, noted in enumerate((first, second)):
        # The ids of the next batch are sent during a step: one batch more than steps.
        ids = sum(size for kind, size in noted if "int" in kind) / 21
        vectors = sum(size for kind, size in noted if "float" in kind) / 20
        assert ids == pytest.approx(sum(t.ids_R[rank] for t in tables), rel=0.07)
        assert vectors == pytest.approx(sum(t.forward_R[rank] + t.backward_R[rank] for t in tables), rel=0.07)


def command(*words: str, arm: str = "sid_ngram") -> list[str]:
    specs = ["--input-spec", str(ROOT / "configs/plan/dataset.json"), "--sid-spec", str(ROOT / "configs/plan/sid.json")]
    config = str(ROOT / "configs/complete_journey.yaml")
    return ["--config", config, *specs, "--memory-gib", "80", "--set", f"ranker.arm={arm}", *words]


def test_command_prints_the_plan_and_its_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = [word for column in LARGE for word in ("--table-rows", f"{column}=1000000000")]
    work = ["--rows", "29000000000", "--samples-per-second", "1e6"]
    once = ["--set", "ranker.training.epochs=1"]
    main(command("--ranks", "8", *once, *large, *work, "--json", str(tmp_path / "plan.json")))
    printed = capsys.readouterr().out
    assert "sid_ngram: fits on 8 GPUs, 8 a node" in printed
    assert "28,320,312 steps" in printed  # 29e9 / 1,024
    assert "8.1 hours" in printed  # 29e9 / 1e6 / 3600
    assert "99 ids a row, 792 B as int64; 29,000,000,000 rows: 20.9 TiB" in printed  # 3 + 3 x 32 columns of 8 bytes
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"]
    assert plan["tables"]["t_item_id"]["rows"] == 10**9
    assert plan["constraints"]["t_item_id"]["sharding_types"] == ["table_wise", "row_wise"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ranks", "2", "--table-rows", "item_id=9000000000"), "plan: does not fit: .*short by "),
        (
            ("--ranks", "8", "--table-rows", "items=9"),
            "plan: error: ranker.model.table_rows: 'items' is no id column",
        ),
        (("--ranks", "8", "--table-rows", "item_id=0"), "ranker.model.table_rows.item_id: Input should be greater"),
        (("--ranks", "8", "--table-rows", "item_id"), "'ranker.model.table_rows.item_id': must look like section.key="),
        (("--ranks", "16"), "plan: error: lanes=8: must be a multiple of the number of ranks, 16"),
        (("--ranks", "12"), "--ranks 12: must be a multiple of --ranks-per-node, 8"),
    ],
)
def test_command_refuses_invalid_arguments_with_a_reason(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command(*words, "--json", str(tmp_path / "plan.json")))
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message.split(".*")[0] in printed.err
    assert message.split(".*")[-1] in printed.err
    if "does not fit" in message:
        assert json.loads((tmp_path / "plan.json").read_text())["fits"] is False


def test_planned_table_rows_are_those_that_a_training_builds(world: World, tmp_path: Path) -> None:
    dataset, rows = write_dataset(tmp_path / "dataset", rows_a_day=128), {"item_id": 70, "topics": 40, "user_id": 16}
    config, file = tmp_path / "run.yaml", tmp_path / "plan.json"
    config.write_text("ranker: {arm: none, model: {embedding_dim: 8}, training: {batch_size: 64}}")
    sets = [word for column, number in rows.items() for word in ("--table-rows", f"{column}={number}")]
    cluster = ["--ranks", "1", "--device", "cpu", "--memory-gib", "8"]
    main(["--config", str(config), "--dataset", str(dataset), *cluster, *sets, "--json", str(file)])
    planned = {name: table["rows"] for name, table in json.loads(file.read_text())["tables"].items()}
    outcome = run_steps(world, dataset, config_of("none", model={"table_rows": rows}), 2)
    built = {name.split(".")[2]: len(x) for name, x in outcome.weights.items() if name.startswith(COLLECTIONS)}
    assert planned == built
    assert planned == {"t_user_id": 16, "t_item_id": 70, "t_slot": 5, "t_topics": 40, "t_history_item_ids": 300}


def test_tables_too_large_for_any_machine_are_refused_naming_the_option_that_hashes_ids() -> None:
    huge = SPEC.model_copy(update={"sparse": {"slot": 2**63 - 1}})
    with pytest.raises(ConfigError, match=r"the table of 'slot': .*; ranker\.model\.table_rows\.slot hashes ids"):
        arm_features(huge, config_of("none"), {})
    config = config_of("none", model={"table_rows": {"slot": 1000}})
    (slot,) = (bag for bag in arm_features(huge, config, {}).bags if bag.column == "slot")
    assert (slot.num_ids, slot.rows) == (2**63 - 1, 1000)
    large = config_of("none", model={"table_rows": {"slot": 2**57}})
    work = Workload(large, arm_features(SPEC, large, {}), ModelConstants(), Traffic(3.0), None, None)
    with pytest.raises(NoPlanError, match=r"ranker\.model\.table_rows gives id tables fewer rows"):
        plan_of(work, EIGHT)


def test_plan_measures_the_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "dataset", rows_a_day=256)
    config = tmp_path / "run.yaml"
    config.write_text("ranker: {arm: side, training: {batch_size: 64}}")
    main(["--config", str(config), "--dataset", str(tmp_path / "dataset"), "--ranks", "2", "--memory-gib", "1"])
    printed = capsys.readouterr().out
    assert "1,024 rows / 64 x 1 epochs = 16 steps" in printed
    assert "B in Parquet; 1,024 rows" in printed
