"""What a stage's key depends on, and what it does not depend on."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidestack.infra.code import ROOT, code_digest, python_files
from sidestack.infra.config import parse
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.graph import Stage, key, stages

MODULES = {
    "prepare": "sidestack.pipelines.prepare.__main__",
    "encoder": "sidestack.encoder.train",
    "materialize": "sidestack.encoder.materialize",
    "ranker": "sidestack.ranker.train",
    "baseline": "sidestack.ranker.baseline.__main__",
    "compare": "sidestack.pipelines.compare",
}


def config(**sections: Any) -> PipelineConfig:
    return parse(PipelineConfig, {"run": {"name": "test", "replicates": 1}} | sections, "test")


def plan(**sections: Any) -> dict[str, Stage]:
    return {stage.label: stage for stage in stages(config(**sections))}


def keys(**sections: Any) -> dict[str, str]:
    """Return the stages' keys, with the key of an input's stage in place of the input's digest."""
    found: dict[str, str] = {}
    for label, stage in plan(**sections).items():
        found[label] = key(stage, {name: found[source] for name, source in stage.inputs.items()})
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {label for label in before if before[label] != after[label]}


def test_stages_come_after_their_inputs() -> None:
    seen: set[str] = set()
    found = plan(run={"name": "test"})
    for label, stage in found.items():
        assert set(stage.inputs.values()) <= seen
        seen.add(label)
    assert list(found) == [
        "prepare",
        "encoder", "materialize", "ranker-none", "ranker-dense", "ranker-sid_ngram", "ranker-side", "baseline",
        "encoder-r1", "materialize-r1", "ranker-none-r1", "ranker-dense-r1", "ranker-sid_ngram-r1", "ranker-side-r1",
        "baseline-r1",
        "compare",
    ]  # fmt: skip


def test_every_replicate_has_encoders_dataset_and_arms_of_its_own() -> None:
    run = {"name": "test", "arms": ["none", "side"], "replicates": 2}
    found = plan(run=run, encoders={"text_sid": {"signals": {"text_embedding": 1.0}}})
    assert list(found) == [
        "prepare",
        "encoder", "encoder-text_sid", "materialize", "ranker-none", "ranker-side", "baseline",
        "encoder-r1", "encoder-text_sid-r1", "materialize-r1", "ranker-none-r1", "ranker-side-r1", "baseline-r1",
        "compare",
    ]  # fmt: skip
    assert found["materialize-r1"].inputs == {
        "dataset": "prepare", "encoder.sid": "encoder-r1", "encoder.text_sid": "encoder-text_sid-r1",
    }  # fmt: skip
    assert found["ranker-side-r1"].inputs == {"dataset": "materialize-r1"}
    assert found["baseline-r1"].inputs == {"dataset": "materialize-r1"}
    assert found["compare"].inputs == {
        "arm.none.0": "ranker-none", "arm.side.0": "ranker-side", "arm.baseline.0": "baseline",
        "arm.none.1": "ranker-none-r1", "arm.side.1": "ranker-side-r1", "arm.baseline.1": "baseline-r1",
        "encoder.sid": "encoder", "encoder.text_sid": "encoder-text_sid",
        "prepare": "prepare", "dataset": "materialize",
    }  # fmt: skip


def test_further_replicate_does_not_change_the_first() -> None:
    before, after = keys(), keys(run={"name": "test", "replicates": 2})
    assert {label for label in before if before[label] != after[label]} == {"compare"}
    assert after["encoder-r1"] != after["encoder"]
    assert after["ranker-none-r1"] != after["ranker-none"]


def test_keys_are_the_same_every_time() -> None:
    assert keys() == keys()
    assert all(len(value) == 64 for value in keys().values())


def test_ranker_setting_changes_only_rankers_and_comparison() -> None:
    after = keys(ranker={"training": {"seed": 12345}})
    assert changed(keys(), after) == {"ranker-none", "ranker-dense", "ranker-sid_ngram", "ranker-side", "compare"}


def test_setting_of_an_arm_changes_only_the_arm_and_the_comparison() -> None:
    arms = config().ranker.model_dump(mode="json")["arms"]
    arms["side"]["overlay"] = {"training": {"sparse_learning_rate": 0.123}}
    assert changed(keys(), keys(ranker={"arms": arms})) == {"ranker-side", "compare"}


def test_the_baseline_has_the_dates_of_the_arms_and_a_seed_for_each_replicate() -> None:
    found = plan(
        run={"name": "test", "replicates": 2}, ranker={"holdout": {"kind": "validation"}}, baseline={"seed": 5}
    )
    configs = [found[label].config.model_dump() for label in ("baseline", "baseline-r1")]
    assert [one["seed"] for one in configs] == [5, 6]
    assert {one["holdout"]["kind"] for one in configs} == {"validation"}


def test_setting_of_the_baseline_changes_only_the_baseline_and_the_comparison() -> None:
    assert changed(keys(), keys(baseline={"max_iter": 7})) == {"baseline", "compare"}


def test_disabling_the_baseline_changes_only_the_comparison() -> None:
    before, after = keys(), keys(baseline={"enabled": False})
    assert before.keys() - after.keys() == {"baseline"}
    assert {label for label in after if before[label] != after[label]} == {"compare"}


def test_setting_of_the_comparison_changes_only_the_comparison() -> None:
    assert changed(keys(), keys(compare={"seed": 5})) == {"compare"}


def test_launch_settings_change_no_key() -> None:
    run = {
        "name": "other",
        "replicates": 1,
        "scheduler": "slurm",
        "launch": {"encoder": {"ranks": 4, "nodes": 2, "gpu": 4}},
    }
    assert changed(keys(), keys(run=run)) == set()


def test_cache_folder_changes_no_key() -> None:
    assert changed(keys(), keys(prepare={"cache_dir": "/elsewhere"})) == set()


def test_another_source_changes_the_key() -> None:
    prepare = plan()["prepare"]
    assert key(prepare, {}, "a" * 64) != key(prepare, {}, "b" * 64)


def test_other_input_bytes_change_the_key() -> None:
    encoder = plan()["encoder"]
    assert key(encoder, {"dataset": "a" * 64}) != key(encoder, {"dataset": "b" * 64})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("infra/a.py", "encoder/b.py", "encoder/sub/c.py", "ranker/d.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x = 1\n")
    return tmp_path


@pytest.mark.parametrize("name", ["infra/a.py", "encoder/b.py", "encoder/sub/c.py"])
def test_changed_code_changes_the_digest(tree: Path, name: str) -> None:
    before = code_digest(("infra", "encoder"), tree)
    (tree / name).write_text("x = 2\n")
    assert code_digest(("infra", "encoder"), tree) != before


def test_a_renamed_or_new_module_changes_the_digest(tree: Path) -> None:
    before = code_digest(("encoder",), tree)
    (tree / "encoder/b.py").rename(tree / "encoder/e.py")
    renamed = code_digest(("encoder",), tree)
    (tree / "encoder/new.py").touch()
    assert len({before, renamed, code_digest(("encoder",), tree)}) == 3


def test_other_packages_and_files_do_not_change_the_digest(tree: Path) -> None:
    before = code_digest(("infra", "encoder"), tree)
    (tree / "ranker/d.py").write_text("x = 2\n")
    (tree / "encoder/notes.txt").write_text("notes")
    assert code_digest(("infra", "encoder"), tree) == before


def imports(file: Path) -> Iterator[Path]:
    """Yield the project's files that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = ROOT / name.removeprefix("sidestack.").replace(".", "/")
            for found in (path.with_suffix(".py"), path / "__init__.py"):
                if found.is_file():
                    yield found


@pytest.mark.parametrize("label", ["prepare", "encoder", "materialize", "ranker-side", "baseline", "compare"])
def test_key_covers_all_code_that_a_stage_can_import(label: str) -> None:
    stage = plan()[label]
    waiting = [ROOT / f"{MODULES[stage.name].removeprefix('sidestack.').replace('.', '/')}.py"]
    reached: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting += imports(file)
    empty = {file for file in reached if not file.read_text().strip() or file.name == "__init__.py"}
    missing = reached - set(python_files(stage.code)) - empty
    assert not missing, f"{label} may run {sorted(map(str, missing))}, which its key does not cover"
