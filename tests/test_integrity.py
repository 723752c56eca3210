"""Damaged, exchanged and missing files are found by the code that reads them (docs/integrity.md)."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.published import find_published
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.checkpoint import Checkpoint, Checkpoints
from sidestack.infra.config import Config, parse
from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import CommitError, DataError, SidestackError
from sidestack.infra.manifest import MANIFEST, read_manifest, verify
from sidestack.infra.partitions import LISTS
from sidestack.infra.served import load_served
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.retrain.ledger import OUTCOME_FILE, PLAN_FILE, Ledger, Outcome, Plan
from tests.pipelines.fabricated import all_inputs
from tests.whole_run import make_run

STAGES = (
    "prepare", "encoder", "materialize", "ranker", "baseline", "score", "export", "ranker_export", "compare"
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return all_inputs(tmp_path_factory.mktemp("compared"), rows=500)


@pytest.fixture(scope="module")
def run(world: World, compared: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    make_run(folder, world, compared)
    return folder


@pytest.fixture(scope="module")
def again(world: World, compared: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a second run of the same configuration, in another folder."""
    folder = tmp_path_factory.mktemp("again")
    make_run(folder, world, compared)
    return folder


@pytest.fixture(scope="module")
def other(world: World, compared: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with another seed, whose files have the same names and mostly the same sizes."""
    folder = tmp_path_factory.mktemp("other")
    make_run(folder, world, compared, seed=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_repeated_run_has_the_same_digests(run: Path, again: Path, stage: str) -> None:
    first, second = read_manifest(run / stage), read_manifest(again / stage)
    record = ("summary.json", "history.jsonl")
    differ = {name for name, entry in first.files.items() if second.files.get(name) != entry and name not in record}
    assert not differ and first.digest == second.digest


# Each of these functions opens a part of a run's folder as the code that uses that part does.


def open_stage(stage: str) -> Callable[[Path], object]:
    """Verify a stage's output, as `infra.stage` does with an input and the driver with an existing output."""
    return lambda run: verify(run / stage, stage=stage)


def open_partition(table: str) -> Callable[[Path], object]:
    def opened(run: Path) -> None:
        dataset = read_dataset(run / "materialize")
        for entry in dataset.partitions(table.format(sids=dataset.snapshot.sids["sid"].table("sid", "items"))):
            dataset.verify_partition(entry)

    return opened


def open_map(run: Path) -> None:
    dataset = read_dataset(run / "materialize")
    published = find_published(dataset, parse(SidSpec, dataset.snapshot.sids["sid"].spec, "test"))
    assert published is not None
    published.maps()


def open_served(stage: str) -> Callable[[Path], object]:
    return lambda run: load_served(run / stage / "model")


class Settings(Config):
    """The settings of a stage that writes checkpoints."""


def checkpoints(run: Path) -> Checkpoints:
    return Checkpoints(run / "out.checkpoint", ALONE, "test", {}, Settings())


def open_ledger(run: Path) -> Ledger:
    return Ledger(run / "retrained")


READ: dict[str, tuple[Callable[[Path], object], str] | tuple[Callable[[Path], object], str, str]] = {
    "encoder bundle": (open_stage("encoder"), "encoder/weights.safetensors"),
    "encoder's description": (open_stage("encoder"), "encoder/encoder.json"),
    "encoder's bundle, loaded": (lambda run: load_bundle(run / "encoder", torch.device("cpu")), "encoder/weights.*"),
    "snapshot": (open_stage("materialize"), "materialize/snapshot.json"),
    "dataset.json": (open_stage("materialize"), "materialize/dataset.json", "prepare/dataset.json"),
    "list of partitions": (lambda run: read_dataset(run / "materialize"), f"dataset/store/{LISTS}/*.json"),
    "partition of items": (open_partition("items"), "dataset/store/items/*/*/*.parquet"),
    "partition of events": (open_partition("events"), "dataset/store/events/*/*/*.parquet"),
    "SID columns": (open_partition("{sids}"), "dataset/store/sids/sid/*/items/*/*/*.parquet"),
    "published map": (open_map, "dataset/store/sids/sid/*/items/*/*/map.int64"),
    "ranker": (open_stage("ranker"), "ranker/model/shared.safetensors"),
    "ranker's tables": (open_stage("ranker"), "ranker/model/shards/*.safetensors"),
    "ranker's predictions": (open_stage("ranker"), "ranker/predictions/*.parquet"),
    "manifest": (open_stage("ranker"), f"ranker/{MANIFEST}"),
    "comparison": (open_stage("compare"), "compare/comparison.json", "compare/summary.json"),
    "checkpoint": (lambda run: checkpoints(run).load(), "out.checkpoint/step-*/shared.safetensors"),
    "export": (open_stage("export"), "export/model/artifacts/weights.safetensors"),
    "served encoder": (open_served("export"), "export/model/artifacts/weights.safetensors"),
    "served ranker": (open_served("ranker_export"), "ranker_export/model/artifacts/version/tables.safetensors"),
    "served ranker's description": (
        open_served("ranker_export"), "ranker_export/model/artifacts/version/served.json"
    ),
    "plan of a cycle": (open_ledger, f"retrained/cycles/0001/{PLAN_FILE}"),
    "outcome of a cycle": (open_ledger, f"retrained/cycles/0001/{OUTCOME_FILE}"),
}  # fmt: skip


def flip(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    at = next(at for at in range(len(data) // 2, len(data)) if chr(data[at]).isdigit() or file.suffix != ".json")
    data[at] ^= 1
    file.write_bytes(data)


def truncate(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size - 3)


def delete(file: Path, other: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    """Replace the file by that of another run."""
    assert other.read_bytes() != file.read_bytes()
    shutil.copyfile(other, file)


FAULTS = {"flipped bit": flip, "truncation": truncate, "deletion": delete, "file of another run": swap}


@pytest.fixture(scope="module")
def prepared(run: Path, other: Path) -> tuple[Path, Path]:
    """Add a checkpoint and a ledger of retraining cycles to both runs."""
    for number, folder in enumerate((run, other)):
        checkpoints(folder).save(Checkpoint(7, {"x": torch.arange(9.0) + number}, {}, {"at": number}))
        ledger = Ledger(folder / "retrained")
        ledger.open(parse(Plan, {"number": 1, "at": f"2024-01-0{number + 1}T00:00:00Z", "why": "test"}, "test"))
        ledger.close(parse(Outcome, {"at": "2024-01-03T00:00:00Z", "promoted": bool(number)}, "test"))
    return run, other


UNDETECTED = {("outcome of a cycle", "deletion")}
"""A last cycle without an outcome counts as unfinished and is repeated, so its deletion is not an error."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", READ)
def test_damaged_file_raises_an_error_that_names_the_run(
    prepared: tuple[Path, Path], tmp_path: Path, kind: str, fault: str
) -> None:
    """The first file that matches is damaged; the fault "file of another run" takes the other run's last match."""
    opened, pattern, *another = READ[kind]
    opened(prepared[0])
    run = shutil.copytree(prepared[0], tmp_path / "run")
    file = min(run.glob(pattern))
    FAULTS[fault](file, max(prepared[1].glob(*another or [pattern])))
    if (kind, fault) in UNDETECTED:
        opened(run)
        return
    with pytest.raises(SidestackError) as found:
        opened(run)
    assert str(run) in str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder bundle", "partition of items", "ranker", "manifest"])
def test_symbolic_link_in_place_of_a_file_is_refused(prepared: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    opened, pattern, *_ = READ[kind]
    run = shutil.copytree(prepared[0], tmp_path / "run")
    file = min(run.glob(pattern))
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CommitError, match=f"{file}: is a link"):
        opened(run)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["exchanged", "another's", "earlier"])
def test_directory_in_place_of_another_is_refused(prepared: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    """Each directory is intact, so only its stage, key and digests show that it is in the wrong place."""
    run = shutil.copytree(prepared[0], tmp_path / "run")
    if damage == "exchanged":
        for before, after in (("encoder", "x"), ("score", "encoder"), ("x", "score")):
            (run / before).rename(run / after)
        with pytest.raises(CommitError, match="encoder: is of stage 'score', not of 'encoder'"):
            open_stage("encoder")(run)
        return
    partition = min((run / "dataset/store/events").glob("*/*"))
    others = max((prepared[0] / "dataset/store/events").glob("*/*"))
    if damage == "earlier":
        others = min((run / "dataset/store/requests").glob("*/*"))
    shutil.rmtree(partition)
    shutil.copytree(others, partition)
    with pytest.raises(CommitError, match="is another partition than"):
        open_partition("events")(run)


def copy_as_object_store(source: Path, target: Path) -> None:
    """Copy files only, with new times and modes, as an object store's sync does: no links or empty folders."""
    for file in source.rglob("*"):
        if file.is_file() and not file.is_symlink():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
            place.chmod(0o600)
            os.utime(place, (0, 0))


COPIES: dict[str, Callable[[Path, Path], object]] = {
    "cp -r": lambda source, target: subprocess.run(["cp", "-r", source, target], check=True),
    "cp -a": lambda source, target: subprocess.run(["cp", "-a", source, target], check=True),
    "rsync -a": lambda source, target: subprocess.run(["rsync", "-a", f"{source}/", target], check=True),
    "an object store's sync": copy_as_object_store,
    "mv": lambda source, target: shutil.copytree(source, target.with_name("x")).rename(target),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", COPIES)
def test_copied_run_passes_verification(prepared: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    if how == "rsync -a" and shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    run = tmp_path / "copy"
    COPIES[how](prepared[0], run)
    for stage in STAGES:
        verify(run / stage, stage=stage)
    for opened, *_ in READ.values():
        opened(run)
    dataset = read_dataset(run / "materialize")
    assert dataset.store == run / "dataset/store"
    dataset.verify(ALONE, dataset.snapshot.partitions)


@pytest.mark.slow
def test_partial_copy_is_refused_at_every_file(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """An interrupted copy has some files, a truncated one, and lacks the rest."""
    source = prepared[0] / "ranker"
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for number in range(len(files)):
        out = tmp_path / f"{number}"
        for file in files[: number + 1]:
            place = out / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            content = file.read_bytes()
            place.write_bytes(content[:-1] if file == files[number] else content)
        with pytest.raises(CommitError):
            verify(out)


def test_outcome_of_another_plan_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number in (1, 2):
        plan = {"number": number, "at": "2024-01-01T00:00:00Z", "why": "test", "prepared": f"prepare/{number}"}
        ledger.open(parse(Plan, plan, "test"))
        ledger.close(parse(Outcome, {"at": "2024-01-03T00:00:00Z"}, "test"))
    assert Ledger(tmp_path).cycles == ledger.cycles
    shutil.copyfile(tmp_path / "cycles/0001" / OUTCOME_FILE, tmp_path / "cycles/0002" / OUTCOME_FILE)
    with pytest.raises(DataError, match=r"0002/outcome\.json: came of another plan than plan\.json"):
        Ledger(tmp_path)
