"""Whatever stands in a JSON file that describes something, it is taken, or refused by an error of ours."""

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


def use(spec: DatasetSpec) -> None:
    """Do with a description what every stage does first."""
    flat_schema(spec)
    for entity in ("item", "user"):
        content_schema(spec, entity)
    for task in spec.tasks:
        spec.ancestors(task)


@FILES
@given(values=mutated(DESCRIPTION) | mutated(SPEC.model_dump(mode="json")))
def test_a_description_of_a_dataset_with_faults(values: Any, tmp_path: Path) -> None:
    file = tmp_path / SPEC_FILE
    file.write_text(as_json(values))
    with suppress(SidestackError):
        use(read_spec(file))


@FILES
@given(values=mutated(SID))
def test_a_spec_of_sids_with_faults(values: Any, tmp_path: Path) -> None:
    file = tmp_path / "sid.json"
    file.write_text(as_json(values))
    with suppress(SidestackError):
        parse(SidSpec, read_json(file), "sid.json")


@FILES
@given(content=st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(content: bytes, tmp_path: Path) -> None:
    for read in (read_json, read_spec):
        file = tmp_path / SPEC_FILE
        file.write_bytes(content)
        with suppress(SidestackError):
            reading: Callable[[Path], object] = read
            reading(file)


@FILES
@given(data=st.data())
def test_a_snapshot_with_faults(data: st.DataObject, tmp_path: Path) -> None:
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
