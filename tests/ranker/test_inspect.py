"""`ranker.inspect`: shuffled columns, their importance, and the printed output."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.distributed import World
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.bundle import open_bundle
from sidestack.ranker.inspect import importances, inputs_of, main, open_network, read_rows, shuffle
from tests.ranker.dataset import SPEC, write_dataset
from tests.ranker.test_resume import predictions, train_ranker


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("inspect") / "dataset")


@pytest.fixture(scope="module")
def model(world: World, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "side"
    train_ranker(world, dataset, out, "side", epochs=8)
    return out


def test_local_network_reproduces_the_predictions_of_the_training(dataset: Path, model: Path) -> None:
    bundle, snapshot = open_bundle(model), read_dataset(dataset)
    rows = read_rows(snapshot, bundle, number=10**6)
    p_NT = open_network(bundle, snapshot).probabilities(rows)
    expected = predictions(model)
    assert len(p_NT) == expected.num_rows
    for place, task in enumerate(SPEC.tasks):
        np.testing.assert_allclose(p_NT[:, place], expected[f"p_{task}"], atol=1e-6)


def test_inputs_that_determine_labels_are_important_and_noise_is_not(dataset: Path, model: Path) -> None:
    bundle, snapshot = open_bundle(model), read_dataset(dataset)
    rows = read_rows(snapshot, bundle, 10**6)
    whole, found = importances(open_network(bundle, snapshot), rows)
    assert whole.keys() == set(SPEC.tasks)
    names = [one.name for one in found]
    assert {"item's content", "history", "all dense columns", "user_id", "item_id", "slot", "topics", "rank"} <= {
        *names
    }
    assert len(names) == len(set(names))
    by_name = {one.name: one.rise["click"] for one in found}
    assert [*by_name.values()] == sorted(by_name.values(), reverse=True)
    assert max(by_name["item's content"], by_name["item_id"]) > 5 * abs(by_name["slot"])  # clicks depend on the item


def seconds_before_request(requests: pa.Table) -> list[tuple[list[float]]]:
    """Return by how many seconds the entries of histories precede their requests."""
    times = zip(requests["event_time"].to_pylist(), requests["history_times"].to_pylist(), strict=True)
    return [([(at - entry).total_seconds() for entry in entries],) for at, entries in times]


def test_only_the_columns_of_an_input_are_shuffled_and_they_stay_together(dataset: Path, model: Path) -> None:
    bundle = open_bundle(model)
    rows = read_rows(read_dataset(dataset), bundle, 10**6)
    for one in inputs_of(bundle.description.features()):
        mixed = shuffle(rows, one.columns, np.random.default_rng(0))
        for before, after in ((rows.own, mixed.own), (rows.shared, mixed.shared)):
            changed = {name for name in before.column_names if not before[name].equals(after[name])}
            assert changed <= {*one.columns}
            assert sorted(map(str, before.to_pylist())) != [] and before.schema.equals(after.schema)
        assert {*one.columns} & {*rows.own.column_names, *rows.shared.column_names} == {*one.columns}
    mixed = shuffle(rows, ("history_item_ids", "history_times"), np.random.default_rng(0))
    assert mixed.shared["history_times"] != rows.shared["history_times"]
    assert sorted(seconds_before_request(rows.shared)) == sorted(seconds_before_request(mixed.shared))
    assert [len(ids) for ids in mixed.shared["history_item_ids"].to_pylist()] == [
        len(times) for times in mixed.shared["history_times"].to_pylist()
    ]


def test_command_prints_tables_plan_and_importance(
    dataset: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--model", str(model), "--dataset", str(dataset), "--rows", "300"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "arm side; SIDs: sid abababababab; trained on 2024-01-01 to 2024-01-04"
    assert any(line.split()[:3] == ["t_item_id", "300", "9,600"] for line in lines)
    assert any("held-out rows: click NE " in line for line in lines)
    assert any(line.startswith("item's content") and line.endswith("%") for line in map(str.rstrip, lines))


def test_folder_without_a_ranker_is_reported_as_an_error(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--dataset", str(dataset)])
    assert "inspect: error: " in capsys.readouterr().err
