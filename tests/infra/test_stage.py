"""The run of a stage: its committed output, errors on every rank, checkpoints, options and inputs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sidestack.components.torchrun import Launch, stage_app
from sidestack.infra.code import VARIABLE, code_environment
from sidestack.infra.commit import committing
from sidestack.infra.config import digest, load_section, plain, to_yaml
from sidestack.infra.distributed import process_group
from sidestack.infra.errors import ConfigError
from sidestack.infra.manifest import verify
from sidestack.infra.stage import Inputs, StageRun, run_stage
from tests.infra.tiny_stage import TinyConfig, body


@pytest.fixture
def before(tmp_path: Path) -> Path:
    with process_group() as world, committing(tmp_path / "before", world, stage="before") as staging:
        (staging / "data.txt").write_text("1 2 3")
    return tmp_path / "before"


def launch(tmp_path: Path, before: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "run.yaml"
    config.write_text("encoder: {number: 4}")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        "-m", "tests.infra.tiny_stage", "--config", str(config), "--out", str(tmp_path / "out"),
        "--input", f"before={before}", "--input", f"arm.none={before}", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_stage_on_two_ranks_commits_parts_config_log_and_inputs(tmp_path: Path, before: Path) -> None:
    done = launch(tmp_path, before, "--set", "encoder.number=6", "--key", "abc")
    assert done.returncode == 0, done.stderr
    manifest = verify(tmp_path / "out")
    assert set(manifest.files) == {"part-0.txt", "part-1.txt", "config.yaml", "history.jsonl", "summary.json"}
    assert manifest.key == "abc"
    assert manifest.inputs == {"before": verify(before).digest, "arm.none": verify(before).digest}
    assert (manifest.facts["doubled"], manifest.facts["world_size"]) == (12, 2)
    assert load_section(TinyConfig, tmp_path / "out/config.yaml", "encoder").number == 6
    assert json.loads((tmp_path / "out/summary.json").read_text())["inputs"]["arm.none"] == "before"


RENAMED = ["unshare", "--uts", "bash", "-c", 'hostname no-such-name-of-a-host && exec "$@"', "renamed"]
"""Prefix of a command that runs with a host name that does not resolve."""


@pytest.mark.skipif(
    subprocess.run([*RENAMED, "true"], capture_output=True).returncode != 0, reason="needs root: unshare"
)
def test_ranks_connect_on_a_machine_whose_name_does_not_resolve(tmp_path: Path) -> None:
    """The ranks start with the components' options; with torchrun's own they fail after five minutes."""
    options = ["--config", str(tmp_path / "run.yaml"), "--input", f"before={tmp_path}", "--out", str(tmp_path / "out")]
    command = shlex.split(
        stage_app("tiny", "tests.infra.tiny_stage", Launch(), config="", out="", inputs={}).roles[0].args[1]
    )
    torchrun = command[1 : command.index("--tee")]
    ended = subprocess.run(
        [*RENAMED, sys.executable, *torchrun[1:], "-m", "tests.infra.tiny_stage", *options],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert "rank 0: error: config" in ended.stderr and "rank 1: error: config" in ended.stderr


def test_error_on_one_rank_is_reported_and_no_output_is_left(tmp_path: Path, before: Path) -> None:
    done = launch(tmp_path, before, "--set", "encoder.fail_on_rank=1")
    assert done.returncode != 0
    assert "tiny: rank 1: error: numbers.parquet, row group 3: 4 is odd" in done.stderr
    # Rank 0 removes its temporary directory unless torchrun kills it first; readers ignore such a directory.
    left = [name for name in os.listdir(tmp_path) if not (name.startswith(".out.") and name.endswith(".tmp"))]
    assert sorted(left) == ["before", "run.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "encoder.nmber=1"], "encoder.nmber: unknown key"),
        (["--input", "other=x"], "--input 'other': unknown; this stage takes: before, arm.*"),
    ],
)
def test_user_error_is_reported_on_every_rank(tmp_path: Path, before: Path, arguments: list[str], message: str) -> None:
    done = launch(tmp_path, before, *arguments)
    assert done.returncode != 0
    assert all(f"tiny: rank {rank}: error: " in done.stderr for rank in (0, 1))
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_altered_input_is_refused_on_every_rank(tmp_path: Path, before: Path) -> None:
    (before / "data.txt").write_text("1 2 4")
    done = launch(tmp_path, before)
    assert all(f"rank {rank}: error: " in done.stderr for rank in (0, 1))
    assert "data.txt: SHA-256" in done.stderr


def test_stage_refuses_code_other_than_its_key_names(
    tmp_path: Path, before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older image's output would otherwise be committed under the new code's key."""
    monkeypatch.setenv(VARIABLE, f"{'0' * 64}:infra:tests/infra/tiny_stage.py")
    done = launch(tmp_path, before)
    assert done.returncode != 0
    assert "is not the code that the job's key names, 000000000000; make the image" in done.stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv(VARIABLE, code_environment(("infra", "tests/infra/tiny_stage.py"))[VARIABLE])
    assert launch(tmp_path, before).returncode == 0


def test_committed_output_is_not_overwritten(tmp_path: Path, before: Path) -> None:
    assert launch(tmp_path, before, ranks=1).returncode == 0
    again = launch(tmp_path, before, "--set", "encoder.number=9", ranks=1)
    assert again.returncode != 0
    assert "committed already and is never overwritten" in again.stderr
    assert (tmp_path / "out/part-0.txt").read_text() == "4"


def run_tiny(
    tmp_path: Path, before: Path, *arguments: str, text: str = "encoder: {number: 4, fail_after_checkpoint: true}"
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    inputs = ["--input", f"before={before}", "--input", f"arm.none={before}"]
    places = ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]
    run_stage("tiny", "encoder", TinyConfig, ["before", "arm.*"], body, [*places, *inputs, *arguments])


def test_profile_option_is_accepted_by_training_stages_only(
    tmp_path: Path, before: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []

    def steps(run: StageRun[TinyConfig]) -> None:
        taken.append(run.profile.steps)
        (run.out / "data.txt").write_text("")

    arguments = ["--input", f"before={before}"]
    for number, given in enumerate(([], ["--profile", "7"])):
        places = ["--out", str(tmp_path / f"out-{number}")]
        run_stage("tiny", "encoder", TinyConfig, ["before"], steps, [*arguments, *places, *given], is_training=True)
    assert taken == [0, 7]
    for wrong, is_training in (("7", False), ("-1", True), ("x", True)):
        with pytest.raises(SystemExit) as ended:
            run_stage(
                "tiny", "encoder", TinyConfig, ["before"], steps,
                [*arguments, f"--profile={wrong}", "--out", "unused"], is_training=is_training,
            )  # fmt: skip
        assert ended.value.code == 2
    assert "must be a whole number, at least 0" in capsys.readouterr().err


def test_stage_resumes_from_its_checkpoint_until_it_commits(
    tmp_path: Path, before: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in [
        (["--key", "abc"], "failed after its checkpoint"),
        (["--key", "abd"], "out.checkpoint: is a checkpoint of other work (key: 'abc' there, 'abd' here)"),
        (["--key", "abc", "--set", "encoder.number=5"], "is a checkpoint of other work (config: "),
    ]:
        with pytest.raises(SystemExit):
            run_tiny(tmp_path, before, *arguments)
        assert message in capfd.readouterr().err
        assert sorted(os.listdir(tmp_path)) == ["before", "out.checkpoint", "run.yaml"]
    run_tiny(tmp_path, before, "--key", "abc")
    assert verify(tmp_path / "out").facts["resumed_from"] == 4
    assert sorted(os.listdir(tmp_path)) == ["before", "out", "run.yaml"]


CHOOSING = "encoder: {variant: b, fail_after_checkpoint: true, variants: {a: 1, b: 2"


def test_checkpoint_is_loaded_after_another_variant_is_added_to_the_file(tmp_path: Path, before: Path) -> None:
    with pytest.raises(SystemExit):
        run_tiny(tmp_path, before, text=CHOOSING + "}}")
    run_tiny(tmp_path, before, text=CHOOSING + ", c: 3}}")
    facts = verify(tmp_path / "out").facts
    assert (facts["doubled"], facts["resumed_from"]) == (4, 2)


def test_checkpoint_is_loaded_with_the_resolved_configuration(tmp_path: Path, before: Path) -> None:
    with pytest.raises(SystemExit):
        run_tiny(tmp_path, before, "--set", "encoder.variant=a", text=CHOOSING + "}}")
    resolved = TinyConfig(variant="a", fail_after_checkpoint=True, variants={"a": 1, "b": 2}).resolved()
    run_tiny(tmp_path, before, text=to_yaml({"encoder": plain(resolved)}))
    manifest = verify(tmp_path / "out")
    assert (manifest.facts["config"], manifest.facts["resumed_from"]) == (digest(resolved), 1)


def test_input_names_are_validated() -> None:
    takes = Inputs(("a", "arm.*"), ("start",))
    assert takes.named(["a=x", "arm.side=y"]) == {"a": Path("x"), "arm.side": Path("y")}
    assert takes.named(["a=x", "start=z", "arm.side=y"])["start"] == Path("z")
    for pairs, message in [
        (["a"], "must look like name=directory"),
        (["a=x", "a=y"], "given twice"),
        (["a=x"], r"--input arm\.\*=DIR: is missing"),
        (["arm.x=y"], "--input a=DIR: is missing"),
        (["b=x"], r"'b': unknown; this stage takes: a, arm\.\*, start \(may be left out\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            takes.named(pairs)
