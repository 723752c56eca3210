"""Any content of a run file is read or refused with a SidestackError."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidestack.infra.code import ROOT
from sidestack.infra.config import digest, load_section, parse, plain, to_yaml
from sidestack.infra.errors import SidestackError
from sidestack.pipelines.config import PipelineConfig, read_config
from sidestack.pipelines.graph import stages
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.ranker.config import RankerConfig
from tests.fuzz.values import VALUES, mutated

SHIPPED = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "benchmarks/replay").glob("*.yaml")])
VALID = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in SHIPPED]
WHOLE = [plain(read_config(file, [])[1]) for file in SHIPPED]
"""The same files with all defaults filled in, so that every setting can be mutated."""
FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def read_all(file: Path, overrides: tuple[str, ...] = ()) -> None:
    """Read a file as the driver and the stages do; for a valid file run everything that precedes a launch."""
    with suppress(SidestackError):
        config = read_config(file, overrides)[1]
        for stage in stages(config):
            digest(stage.config)
            to_yaml({stage.section or stage.name: plain(stage.config)})
            stage.launch.model_dump_json()
    with suppress(SidestackError):
        load_section(PrepareConfig, file, "prepare", overrides).resolved()
    with suppress(SidestackError):
        load_section(RankerConfig, file, "ranker", overrides).resolved()


@FILES
@given(values=st.sampled_from([*VALID, *WHOLE]).flatmap(mutated))
def test_shipped_file_with_faults_is_read_or_refused(values: Any, tmp_path: Path) -> None:
    with suppress(SidestackError):
        parse(PipelineConfig, values, "made up")
    file = tmp_path / "run.yaml"
    with suppress(yaml.YAMLError, UnicodeEncodeError):  # values that cannot be written to a file
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        read_all(file)


@FILES
@given(data=st.data())
def test_shipped_file_with_changed_characters_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(data.draw(st.sampled_from(SHIPPED)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 3))
        signs = st.sampled_from(
            [b"{", b"]", b": ", b"\n", b"&a ", b"*a", b"<<: ", b"!!int ", b"? ", b"- ", b"'", b"\xff"]
        )
        content[at : at + length] = data.draw(st.one_of(signs, st.binary(max_size=4)))
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    read_all(file)


@FILES
@given(
    key=st.sampled_from(
        ["encoder.training.epochs", "ranker.arms.none", "run", "run.name", "prepare.source", "x", "a..b"]
    ),
    text=st.one_of(st.text(max_size=20), VALUES.map(repr)),
)
def test_any_override_is_read_or_refused(key: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {name: r}\n")
    read_all(file, (f"{key}={text}",))


@pytest.mark.parametrize("number", range(len(SHIPPED)))
def test_unchanged_shipped_file_is_valid(number: int) -> None:
    """If it were invalid, its mutations would be refused for another reason."""
    assert parse(PipelineConfig, WHOLE[number], SHIPPED[number].name)
    assert parse(PipelineConfig, VALID[number], SHIPPED[number].name)
