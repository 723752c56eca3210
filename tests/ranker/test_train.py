"""The ranker's stage from end to end on one rank: predictions, summary, plan, history and saved model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import sidestack.infra.parquet
from sidestack.infra.commit import committing
from sidestack.infra.distributed import World
from sidestack.infra.footer import read_footer
from sidestack.infra.manifest import read_manifest, verify
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.tables import TaskSpec, ancestors
from sidestack.infra.tracking import RunLog
from sidestack.ranker import throughput
from sidestack.ranker.bundle import FOLDER, read_bundle
from sidestack.ranker.constants import read_constants
from sidestack.ranker.cost import column_cost
from sidestack.ranker.fit import start_model
from sidestack.ranker.metrics import prediction_metrics, prediction_schema
from sidestack.ranker.planner import Traffic
from sidestack.ranker.predict import predict
from sidestack.ranker.preparation import open_splits
from sidestack.ranker.trainer import learning_rates
from tests.datasets import joined, write_snapshot_of
from tests.distributed import run_distributed
from tests.noted import noted
from tests.ranker.dataset import CHAIN, ONE_TASK, SIDS, SPEC, TWO_ROOTS, all_days, write_dataset
from tests.ranker.stage import ROWS_A_DAY, run_stage_body, summary_of
from tests.ranker.training import ONE, config_of

ARMS = ("none", "sid_ngram", "side")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("train") / "dataset", rows_a_day=ROWS_A_DAY)


@pytest.fixture(scope="module")
def outputs(world: World, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("out")
    return {arm: run_stage_body(world, dataset, folder / arm, config_of(arm)).out for arm in ARMS}


@pytest.mark.parametrize("arm", ARMS)
def test_every_test_row_is_predicted_once_with_its_labels(arm: str, dataset: Path, outputs: dict[str, Path]) -> None:
    found = pq.read_table(outputs[arm] / "predictions").sort_by("row")
    assert found.schema.equals(prediction_schema(SPEC.tasks))
    events = joined(dataset, None, *SPEC.test)
    assert found["row"].to_pylist() == list(range(2 * ROWS_A_DAY))
    for name in ("user_id", "item_id", "event_time", "click"):
        assert found[name].to_pylist() == events[name].to_pylist()
    # Conversions are judged only after a click.
    pairs = zip(events["click"].to_pylist(), events["conversion"].to_pylist(), strict=True)
    assert found["conversion"].to_pylist() == [label if click else None for click, label in pairs]
    assert ((found["p_click"].to_numpy() > 0) & (found["p_click"].to_numpy() < 1)).all()


@pytest.mark.parametrize("children", ["given", "entire_space"])
@pytest.mark.parametrize("tasks", [ONE_TASK, CHAIN, TWO_ROOTS], ids=lambda tasks: "-".join(tasks))
def test_other_tasks_are_trained_predicted_and_measured(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], tasks: dict[str, TaskSpec], children: str
) -> None:
    path = write_dataset(tmp_path / "dataset", rows_a_day=128, tasks=tasks)
    out = run_stage_body(world, path, tmp_path / "out", config_of("none", training={"children": children})).out
    found = pq.read_table(out / "predictions").sort_by("row")
    assert found.schema.equals(prediction_schema(tasks))
    events = joined(path, None, *SPEC.test)
    labels = {task: events[task].to_pylist() for task in tasks}
    for task in tasks:
        above = [labels[name] for name in ancestors(tasks, task)]
        judged = [label if all(a[row] == 1 for a in above) else None for row, label in enumerate(labels[task])]
        assert found[task].to_pylist() == judged
        assert 0 < found[f"p_{task}"].to_numpy().min() < found[f"p_{task}"].to_numpy().max() < 1
    assert list(summary_of(out)["tasks"]) == list(tasks)
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert {f"train_{task}_{what}" for task in tasks for what in ("ne", "loss")} < set(lines[0])
    assert {f"test_{task}_ne" for task in tasks} <= set(lines[-1])
    printed = capfd.readouterr().err
    assert all(f"test_{task}_auc" in printed for task in tasks)
    is_skipped = children == "entire_space" and tasks is ONE_TASK
    assert ("children=entire_space changes nothing: no task of the dataset has a parent" in printed) == is_skipped


def train_on_each(world: World, dataset: Path, out: Path) -> None:
    run_stage_body(world, dataset, out, config_of("none", sharding={"types": ["table_wise"]}))


def test_rank_without_a_sequence_table_predicts_all_rows(
    dataset: Path, outputs: dict[str, Path], tmp_path: Path
) -> None:
    run_distributed(train_on_each, dataset, tmp_path / "out", world_size=2)
    assert len(json.loads((tmp_path / "out/plan.json").read_text())["real_bytes"]["t_history_item_ids"]) == 1
    one, two = (pq.read_table(out / "predictions").sort_by("row") for out in (outputs["none"], tmp_path / "out"))
    assert two["row"].equals(one["row"])
    flops = [summary_of(out)["flops_per_sample"] for out in (outputs["none"], tmp_path / "out")]
    assert flops[1] == pytest.approx(flops[0], rel=0.1)  # counted on the first rank's rows


def test_a_label_that_is_null_everywhere_is_trained_and_measured_as_unknown(world: World, tmp_path: Path) -> None:
    plain = write_dataset(tmp_path / "plain", rows_a_day=64)
    given = {}
    for day in all_days():
        table = joined(plain, None, day, day)
        at = table.schema.get_field_index("conversion")
        given[day] = table.set_column(at, table.schema.field(at), pa.nulls(64, pa.int8()))
    path = write_snapshot_of(tmp_path / "dataset", SPEC, [], [], given, SIDS.values())
    for children in ("given", "entire_space"):
        training = {"batch_size": 32, "children": children}
        out = run_stage_body(world, path, tmp_path / children, config_of("none", training=training)).out
        found = pq.read_table(out / "predictions")
        assert found["conversion"].null_count == found.num_rows == 128
        assert 0 < found["p_conversion"].to_numpy().min() < found["p_conversion"].to_numpy().max() < 1
        tasks = summary_of(out)["tasks"]
        assert tasks["conversion"]["reason"] == "no row has a complete conversion label"
        assert tasks["click"]["ne"] > 0
        lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        assert lines[0]["train_click_loss"] > 0
        assert "test_conversion_ne" not in lines[-1]


@pytest.mark.parametrize("arm", ARMS)
def test_summary_has_the_measured_values(arm: str, dataset: Path, outputs: dict[str, Path]) -> None:
    summary = summary_of(outputs[arm])
    assert summary["arm"] == arm
    assert summary["tasks"] == prediction_metrics(outputs[arm], tuple(SPEC.tasks))
    assert summary["steps"] == 4 * ROWS_A_DAY // 64
    assert summary["world_size"] == 1
    assert summary["held_out_rows"] == 2 * ROWS_A_DAY
    timed = summary["steps"] - throughput.UNTIMED_STEPS
    assert summary["samples_per_second"] * summary["train_seconds"] == pytest.approx(timed * 64)
    assert 0 <= summary["data_wait_share"] < 1
    assert 2**26 < summary["peak_memory_bytes"] < 2**32
    prefixes = 3**2 + 3**4 + 3**6
    assert summary["sid_table_bytes"] == (2 * prefixes * 8 * 4 if arm == "sid_ngram" else 0)
    assert summary["table_bytes"] - summary["sid_table_bytes"] == (300 + 60 + 5 + 11 + 300) * 8 * 4


def test_cut_histories_are_counted_and_logged_once(
    world: World, dataset: Path, tmp_path: Path, outputs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert summary_of(outputs["side"])["history_entries_cut"] == 0
    # All options of the history at once: the form of the output is the same.
    history = {"max_length": 2, "heads": 2, "encoder_layers": 1, "pooling": "target"}
    training = {"children": "entire_space", "batch_size": 200, "lanes": 8, "epochs": 2}
    config = config_of("side", model={"history": history}, training=training)
    run = run_stage_body(world, dataset, tmp_path / "out", config)
    lengths = [joined(dataset, ["history_times"], day, day)["history_times"].to_pylist() for day in all_days()]
    cut = [sum(max(0, len(row) - 2) for row in rows) for rows in lengths]
    expected = 2 * sum(cut[:4]) + sum(cut[4:])  # two epochs over four days, and the test dates once
    assert summary_of(run.out)["history_entries_cut"] == expected
    printed = [line for line in capfd.readouterr().err.splitlines() if "histories were cut" in line]
    assert len(printed) == 1
    assert printed[0].startswith(f"histories were cut to their newest entries: {expected:,} of ")
    found = pq.read_table(run.out / "predictions").drop_columns(["p_click", "p_conversion"])
    assert found.equals(pq.read_table(outputs["side"] / "predictions").drop_columns(["p_click", "p_conversion"]))


@pytest.mark.parametrize("arm", ARMS)
def test_plan_is_saved_with_its_constraints_estimates_and_real_bytes(arm: str, outputs: dict[str, Path]) -> None:
    plan, facts = json.loads((outputs[arm] / "plan.json").read_text()), summary_of(outputs[arm])["plan"]
    assert plan["constraints"].keys() == plan["tables"].keys() == plan["real_bytes"].keys()
    assert plan["constraints"]["t_item_id"] == {
        "sharding_types": ["table_wise", "row_wise"],
        "kernels": ["fused"],
        "lookups": 64,
        "ids": 1.0,
    }
    for name, table in plan["tables"].items():
        assert sum(shard["size"][0] for shard in table["shards"]) == table["rows"]
        # RowWiseAdagrad has one state per row.
        weights = table["rows"] * 8 * 4
        assert plan["real_bytes"][name] == [{"rank": 0, "weight_bytes": weights, "state_bytes": table["rows"] * 4}]
        assert table["shards"][0]["host_bytes"] > weights + table["rows"] * 4
    real = sum(each[0]["weight_bytes"] + each[0]["state_bytes"] for each in plan["real_bytes"].values())
    estimated = plan["estimated_rank_bytes"][0]["host"]
    kinds = {"row_wise, fused", "table_wise, fused"}
    assert facts["tables"].keys() <= kinds
    assert sum(facts["tables"].values()) == len(plan["tables"])
    assert (facts["real_rank_bytes"], facts["estimated_rank_bytes"]) == (real, estimated)


@pytest.mark.parametrize("arm", ARMS)
def test_the_summary_describes_every_table(arm: str, dataset: Path, outputs: dict[str, Path]) -> None:
    summary = summary_of(outputs[arm])
    tables = {table["table"]: table for table in summary["tables"]}
    assert tables.keys() == json.loads((outputs[arm] / "plan.json").read_text())["tables"].keys()
    assert summary["rows_counted"] == 4 * ROWS_A_DAY
    assert sum(table["bytes"] for table in tables.values()) == summary["table_bytes"]
    items = joined(dataset, ["item_id"], *SPEC.train)["item_id"].unique()
    assert tables["t_item_id"]["distinct_ids"] == len(items)


def test_feature_bytes_are_those_of_the_columns_an_arm_adds(dataset: Path, outputs: dict[str, Path]) -> None:
    assert summary_of(outputs["none"])["feature_bytes_per_row"] == 0
    for arm, columns in {
        "side": ("item_sid", "history_sids"),
        "sid_ngram": tuple(
            f"{base}{end}" for base in ("item_sid", "history_sids") for end in ("", "_prefix_2", "_prefix_4")
        ),
    }.items():
        expected = column_cost(read_dataset(dataset), SPEC.train, columns)
        assert expected.compressed > 0
        assert summary_of(outputs[arm])["feature_bytes_per_row"] == expected.compressed
        assert summary_of(outputs[arm])["feature_bytes_per_row_uncompressed"] == expected.uncompressed


def test_flops_are_those_of_the_matrix_products(dataset: Path, outputs: dict[str, Path]) -> None:
    config = config_of("side")
    fitting, testing = open_splits(read_dataset(dataset), config)
    model = config.model
    d, k, t = model.embedding_dim, model.history.queries, 6
    batch = next(testing.open(config.training, ONE, is_training=False).epoch(0))
    lengths_N = pc.list_value_length(batch.rows.column("history_item_ids")).to_numpy()
    rows = len(lengths_N)
    query = (len(fitting.features.bags) + 1) * d  # ids and the item's content
    width = query + (model.dense_outputs + k) * d
    perceptrons = [
        (2, model.dense_hidden, model.dense_outputs * d), (t, model.content_hidden, d),
        (width, *model.over_arch), *[(model.over_arch[-1], model.tower_hidden, 1)] * 2,
    ]  # fmt: skip
    a_row = sum(a * b for widths in perceptrons for a, b in pairwise(widths))
    a_row += 2 * model.cross_layers * width * model.cross_rank  # DCNv2: down and up again
    a_row += query * k * d + k * d * d  # PMA: queries and Theta; its jagged products do not count
    an_entry = 4 * d + t * d  # three recencies and their bias, Omega
    expected = {"side": a_row + an_entry * lengths_N.sum() / rows}
    expected["none"] = expected["side"] - t * d * lengths_N.sum() / rows - t * model.content_hidden
    expected["none"] -= model.content_hidden * d
    for arm, multiplications in expected.items():
        assert summary_of(outputs[arm])["flops_per_sample"] == pytest.approx(2 * multiplications)


def test_learning_curve_is_logged(outputs: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in (outputs["side"] / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_click_ne" in line] == [8, 15]
    assert {"test_click_ne", "test_conversion_auc"} <= set(lines[-1])


@pytest.mark.parametrize("arm", ARMS)
def test_saved_model_reproduces_the_predictions_of_the_stage(
    world: World, dataset: Path, outputs: dict[str, Path], tmp_path: Path, arm: str
) -> None:
    bundle = read_bundle(outputs[arm] / FOLDER)
    _, held_out = open_splits(read_dataset(dataset), bundle.description.config)
    config = bundle.description.config
    features = bundle.description.features(SPEC)
    runner, _ = start_model(
        features, config, world, read_constants(read_dataset(dataset), features.constants), Traffic()
    )
    sharded = runner.sharded
    assert "optimizer.body.interaction.over_arch.0.weight.exp_avg" not in sharded.state()
    bundle.load(sharded, features)
    predict(runner, held_out.open(config.training, world, False), config.arm, tmp_path / "again", RunLog(None))
    again, before = (pq.read_table(path).sort_by("row") for path in (tmp_path / "again", outputs[arm] / "predictions"))
    assert again.equals(before)
    states = sharded.state()
    assert states["optimizer.body.interaction.over_arch.0.weight.exp_avg"].abs().sum() > 0
    assert any(name.endswith("momentum1") for name in states)


def test_a_validation_run_reads_no_test_date(
    world: World, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("side", holdout={"kind": "validation", "validation_days": 1})
    opened: set[Path] = set()
    # Every reader opens a file by one of these: with a known footer, or to read the footer.
    openers: dict[str, Callable[..., Any]] = {
        "sidestack.infra.parquet.open_parquet": sidestack.infra.parquet.open_parquet
    }
    openers |= {
        f"{module}.read_footer": read_footer
        for module in ("sidestack.infra.rows", "sidestack.infra.parquet", "sidestack.ranker.cost")
    }
    for name, whole in openers.items():
        monkeypatch.setattr(name, noted(lambda path, *_: opened.add(path), whole))
    monkeypatch.setattr("sidestack.infra.snapshot.verify", noted(lambda path: opened.add(path / "any"), verify))
    out = run_stage_body(world, dataset, tmp_path / "out", config).out
    opened = {file for file in opened if file.is_relative_to(dataset)}  # the run also reads its own predictions
    assert {file.parts[-3] for file in opened} == {f"date=2024-01-0{day}" for day in (1, 2, 3, 4)}
    tables = {file.relative_to(dataset / "store").parts[0] for file in opened}
    assert tables == {"requests", "events", "labels", "sids"}
    days = pq.read_table(out / "predictions")["event_time"].cast(pa.date32()).unique().to_pylist()
    assert days == [date(2024, 1, 4)]
    assert summary_of(out)["dates"] == {
        "train": ["2024-01-01", "2024-01-03"],
        "held_out": ["2024-01-04", "2024-01-04"],
    }


def test_learning_rates_rise_and_then_fall() -> None:
    training = config_of("none").training
    rates = [learning_rates(training, step, 20)[0] / training.sparse_learning_rate for step in range(21)]
    assert rates[0] == pytest.approx(1 / 5)
    assert max(rates) == rates[3] or max(rates) == rates[4]
    assert rates[-1] == pytest.approx(training.final_learning_rate)
    assert np.all(np.diff(rates[4:]) < 0)


def command(folder: Path, out: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the stage's command in a process of its own."""
    sets = [part for override in overrides for part in ("--set", override)]
    line: list[str | Path] = [sys.executable, "-m", "sidestack.ranker.train", "--config", folder / "config.yaml", *sets]
    line += ["--input", f"dataset={folder / 'dataset'}", "--out", folder / out]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(line, capture_output=True, text=True, env=clean, check=False)


def test_command_commits_once_logs_briefly_and_refuses_with_a_reason(world: World, tmp_path: Path) -> None:
    with committing(tmp_path / "dataset", world, stage="materialize") as out:
        write_dataset(out, rows_a_day=128)
    (tmp_path / "config.yaml").write_text(
        "ranker: {model: {embedding_dim: 8}, training: {batch_size: 64, eval_batch_size: 64}}"
    )
    done = command(tmp_path, "out", "ranker.arm=side")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.facts["arm"] == "side"
    assert {"summary.json", "plan.json", "predictions/part-00000.parquet"} <= set(manifest.files)
    assert "Warning" not in done.stderr
    assert len(done.stderr.splitlines()) < 12
    again = command(tmp_path, "out", "ranker.arm=side")
    assert again.returncode == 1
    assert "is committed already and is never overwritten" in again.stderr
    unknown = command(tmp_path, "other", "ranker.arm=densest")
    assert unknown.returncode == 1
    assert "arm 'densest' is unknown; arms are none, dense, sid_ngram, side" in unknown.stderr
    assert not list(tmp_path.glob("*other*"))
