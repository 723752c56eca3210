"""Values of a configuration reach a stage's `sys.argv` unchanged, through bash and through Slurm's script."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torchx.specs import AppDef, macros

from sidestack.components.torchrun import Launch, stage_app
from sidestack.infra.slurm import SlurmNodes

WORD = st.text(
    st.one_of(
        st.sampled_from(list(" '\"\\$`!;&|<>(){}[]*?~#=%,:\n\t-")), st.characters(exclude_categories=["Cs", "Cc"])
    ),
    min_size=1,
    max_size=20,
)
"""Shells' special characters and any others except NUL and lone surrogates, which no configuration has."""
BASH = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])

RECORD_ARGUMENTS = """#!/bin/sh
printf '%s\\0' "$@" > "$RECORD"
"""


@pytest.fixture(autouse=True)
def _without_slurm_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the query whether a cluster counts memory, which is slow if Slurm is installed here but not running."""
    monkeypatch.setattr("sidestack.infra.slurm._counts_memory", lambda partition: True)


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Return a directory with fake programs that record their arguments: `python` for stages, `srun` for Slurm."""
    for name in ("python", "srun"):
        (tmp_path / name).write_text(RECORD_ARGUMENTS)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def recorded(command: list[str], commands: Path) -> list[str]:
    """Run a command and return the arguments that the fake program got."""
    record = commands / "record"
    record.unlink(missing_ok=True)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "RECORD": str(record), "SLURM_JOB_ID": "17"}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=commands)
    assert sorted(file.name for file in commands.iterdir()) == ["python", "record", "srun"], (
        "a word was run as a command"
    )
    return record.read_bytes().decode().split("\0")[:-1]


def job(word: str, launch: Launch | None = None) -> AppDef:
    return stage_app(
        "encoder",
        "sidestack.encoder.train",
        launch or Launch(),
        config=f"{word}.yaml",
        out=f"runs/{word}",
        inputs={"dataset": word},
        overrides=[f"encoder.x={word}"],
        key=word,
    )


def require_words(argv: list[str], word: str) -> None:
    found = {
        name: argv[argv.index(name) + 1] for name in ("--config", "--set", "--input", "--out", "--key", "--log-dir")
    }
    assert found == {
        "--config": f"{word}.yaml",
        "--set": f"encoder.x={word}",
        "--input": f"dataset={word}",
        "--out": f"runs/{word}",
        "--key": word,
        "--log-dir": f"runs/{word}.logs",
    }


@BASH
@given(word=WORD)
@example(word="$(touch run)'; touch run; '`touch run`")
@example(word="${app_id} $$ $HOME ~ #")
@example(word="two\nlines")
def test_words_reach_the_stage_through_bash(word: str, commands: Path) -> None:
    values = macros.Values(img_root="", app_id="id", replica_id="0", rank0_env="RANK0")
    role = values.apply(job(word).roles[0])
    subprocess.run([role.entrypoint, "-n", *role.args], check=True)
    require_words(recorded([role.entrypoint, *role.args], commands), word)


@BASH
@given(word=WORD)
@example(word="$(touch run)'; touch run; '`touch run`")
@example(word="${app_id} $$ $HOME ~ #")
@example(word="two\nlines")
def test_words_reach_the_stage_through_slurms_script(word: str, commands: Path) -> None:
    script = SlurmNodes("test").submit_dryrun(job(word), {}).request.script
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    of_srun = recorded(["bash", "-c", script], commands)
    at = of_srun.index("bash")
    require_words(recorded(of_srun[at:], commands), word)


@BASH
@given(word=WORD.filter(lambda word: word.isprintable()))
def test_scheduler_option_is_one_word(word: str) -> None:
    request = SlurmNodes("test").submit_dryrun(job("x"), {"partition": word}).request
    assert f"--partition={word}" in request.command


@BASH
@given(value=WORD)
@example(value="a,B=c")
@example(value="${app_id} $$ $HOME")
def test_environment_values_reach_the_job_unchanged(value: str) -> None:
    assert SlurmNodes("test").submit_dryrun(job("x", Launch(env={"NOTE": value})), {}).request.env["NOTE"] == value
