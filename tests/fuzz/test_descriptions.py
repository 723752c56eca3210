"""Any content of a JSON description (dataset, SID spec, snapshot) is read or refused with a SidestackError."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.code import ROOT
from sidestack.infra.config import parse
from sidestack.infra.errors import SidestackError
from sidestack.infra.snapshot import SNAPSHOT_FILE, read_dataset
from sidestack.infra.tables import SPEC_FILE, DatasetSpec, content_schema, flat_schema, read_json, read_spec
from tests.datasets import write_snapshot_of
from tests.fuzz.values import mutated
from tests.infra.made_up import DAYS, SPEC, requests, table

DESCRIPTION = json.loads((ROOT / "configs/plan/dataset.json").read_text(encoding="utf-8"))
SID = json.loads((ROOT / "configs/plan/sid.json").read_text(encoding="utf-8"))
FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def as_json(values: Any) -> str:
    return json.dumps(values, default=str)


def build_schemas(spec: DatasetSpec) -> None:
    """Build the schemas of a dataset, as every stage does first."""
    flat_schema(spec)
    for entity in ("item", "user"):
        content_schema(spec, entity)
    for task in spec.tasks:
        spec.ancestors(task)


@FILES
@given(values=mutated(DESCRIPTION) | mutated(SPEC.model_dump(mode="json")))
def test_dataset_description_with_faults_is_read_or_refused(values: Any, tmp_path: Path) -> None:
    file = tmp_path / SPEC_FILE
    file.write_text(as_json(values))
    with suppress(SidestackError):
        build_schemas(read_spec(file))


@FILES
@given(values=mutated(SID))
def test_sid_spec_with_faults_is_read_or_refused(values: Any, tmp_path: Path) -> None:
    file = tmp_path / "sid.json"
    file.write_text(as_json(values))
    with suppress(SidestackError):
        parse(SidSpec, read_json(file), "sid.json")


@FILES
@given(content=st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused(content: bytes, tmp_path: Path) -> None:
    for read in (read_json, read_spec):
        file = tmp_path / SPEC_FILE
        file.write_bytes(content)
        with suppress(SidestackError):
            reading: Callable[[Path], object] = read
            reading(file)


@FILES
@given(data=st.data())
def test_snapshot_with_faults_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    if not snapshot.exists():
        write_snapshot_of(snapshot, SPEC, days={day: table(requests(day, [2, 1])) for day in DAYS})
    file = snapshot / SNAPSHOT_FILE
    before = file.read_bytes()
    try:
        file.write_text(as_json(data.draw(mutated(json.loads(before)))))
        with suppress(SidestackError):
            read_dataset(snapshot).files("events")
    finally:
        file.write_bytes(before)
