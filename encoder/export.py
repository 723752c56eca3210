"""Stage `export`: the encoder as an MLflow model that answers requests with SIDs.

The model is saved "from code": `encoder/served_model.py`, the packages that it imports, and the bundle's safetensors.
Before the commit, the saved copy is loaded again and must reproduce the SIDs of items of the tables.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from sidestack.encoder.bundle import ENCODER_FILE, WEIGHTS_FILE, EncoderBundle, load_bundle
from sidestack.encoder.export_config import ExportConfig
from sidestack.encoder.published import encoder_of
from sidestack.encoder.serving import Item, ServedConfig, ServedSid, require_same_encoder
from sidestack.encoder.sid.columns import sid_columns
from sidestack.encoder.sid.spec import DEFAULT_NAME, SidSpec
from sidestack.encoder.signals import Precision, stored_precisions
from sidestack.infra.config import parse, plain
from sidestack.infra.distributed import raise_on_all_ranks
from sidestack.infra.errors import SpecError
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.registration import register_if_named
from sidestack.infra.served import load_served, save_served
from sidestack.infra.snapshot import CONTENT, Dataset, read_dataset
from sidestack.infra.stage import StageRun, run_stage

MODEL_FOLDER = "model"
CODE = ("encoder", "infra")
"""Packages that the saved model contains; the ranker and the pipelines are not among them."""


@dataclass(frozen=True)
class Reference:
    """The first items of materialized tables, with their SIDs.

    Attributes:
        items: their signals. answers: their SID columns, None where null.
        spec: the spec of the SIDs. stored: precision of each embedding's column.
    """

    items: list[Item]
    answers: list[ServedSid]
    spec: SidSpec
    stored: dict[str, Precision]


def export(run: StageRun[ExportConfig]) -> None:
    """Save the model in `run.out`, check it and register it.

    Raises:
        DataError: an input is invalid. CommitError: a partition that is read is missing or was altered.
        SpecError: the tables' SIDs are another encoder's, or the saved model returns other SIDs.
        StageError: the registry refuses the model.
    """
    with raise_on_all_ranks(run.world, "exporting the model"):
        if run.world.is_main:
            _export(run)


def _export(run: StageRun[ExportConfig]) -> None:
    encoder, model = run.inputs["encoder"], run.out / MODEL_FOLDER
    bundle = load_bundle(encoder, torch.device("cpu"))
    reference = read_reference(read_dataset(run.inputs["sids"]), bundle, run.config.checked_items)
    config = ServedConfig.model_validate(
        {
            "signals": bundle.signals,
            "spec": reference.spec,
            "stored": reference.stored,
            "max_items": run.config.max_items,
        }
    )
    save_model(model, encoder, config, reference.items[0])
    check_model(model, reference, run.config.max_items)
    name, alias = run.config.registered_model, run.config.alias
    tags = {"sidestack.sid_fingerprint": config.spec.fingerprint, "sidestack.encoder_revision": bundle.revision}
    version = register_if_named(model, name, alias, tags, "export", run.log)
    run.facts.update(fingerprint=config.spec.fingerprint, revision=bundle.revision)
    run.log.summary({"checked_items": len(reference.items), "served": plain(config), "registered": version})


def read_reference(dataset: Dataset, bundle: EncoderBundle, number: int) -> Reference:
    """Read the first items (or users, by the signals' entity) of materialized tables whose SIDs are this encoder's.

    For a refreshed encoder, items that kept their published SIDs are skipped.

    Raises:
        DataError: a signal is missing or of another size, or a file cannot be read.
        SpecError: the items have no SIDs, or none of this encoder's.
        CommitError: a partition that is read is missing or was altered.
    """
    signals = bundle.signals
    signals.require(dataset.spec, dataset.path)
    listed = dataset.snapshot.sids.get(DEFAULT_NAME)
    if listed is None:
        raise SpecError(f"{dataset.path}: has no SIDs {DEFAULT_NAME!r}; input sids is what materialize commits")
    spec = parse(SidSpec, listed.spec, f"{dataset.path}: SIDs {DEFAULT_NAME!r}")
    require_same_encoder(bundle.spec, spec)
    content = CONTENT[signals.entity]
    firsts = {entry.facts["first"] for entry in dataset.partitions(content) if entry.facts["new"]}
    encoded = {first for first in firsts if encoder_of(listed, first) == bundle.revision}
    if not encoded:
        raise SpecError(
            f"{dataset.path}: no SID is of the encoder's revision {bundle.revision[:12]}…, so there is nothing to check"
            " it against; materialize new items with it, or all of them (materialize.published=move)"
        )
    items = _first_rows(dataset, content, list(signals.names), number, encoded)
    columns = list(sid_columns(DEFAULT_NAME, spec))
    answers = _first_rows(dataset, listed.table(DEFAULT_NAME, content), columns, number, encoded)
    return Reference(items.to_pylist(), answers.to_pylist(), spec, stored_precisions(dataset, signals))


def _first_rows(dataset: Dataset, table: str, columns: Sequence[str], number: int, firsts: Collection[int]) -> pa.Table:
    """Read the rows of the first ids, each from the part that added it: the published SID was made from these signals.

    Args:
        firsts: the first new ids of the parts to read.
    """
    parts: list[pa.Table] = []
    for entry in dataset.partitions(table):
        if sum(part.num_rows for part in parts) >= number:
            break
        if not entry.facts["new"] or entry.facts["first"] not in firsts:
            continue
        dataset.verify_partition(entry)
        groups = row_groups([dataset.store / entry.path / file.name for file in entry.files])
        rows = pa.concat_tables([read_row_group(group, columns) for group in groups if group.start < number])
        parts.append(rows.slice(entry.rows - entry.facts["new"]))  # rows that revise earlier ones come first
    return pa.concat_tables(parts).slice(0, number)


def save_model(path: Path, encoder: Path, config: ServedConfig, example: Item) -> None:
    """Save a self-contained MLflow pyfunc model.

    Args:
        path: the folder to make.
        encoder: the bundle's folder.
        config: the served model's settings.
        example: an item, kept with the model as an example of a request.
    """
    save_served(
        path,
        Path(__file__).with_name("served_model.py"),
        "sidestack.encoder.serving:load_answers",
        artifacts={name: encoder / name for name in (ENCODER_FILE, WEIGHTS_FILE)},
        packages=CODE,
        model_config=plain(config),
        input_example=[dict(example)],
        metadata={"sid_fingerprint": config.spec.fingerprint},
    )


def check_model(path: Path, reference: Reference, max_items: int) -> None:
    """Check a saved model against the tables' SIDs.

    Raises:
        SpecError: names an item for which the model returns another SID.
    """
    model = load_served(path)
    for start in range(0, len(reference.items), max_items):
        items = reference.items[start : start + max_items]
        expected = reference.answers[start : start + max_items]
        for at, (given, answer) in enumerate(zip(model.predict(items), expected, strict=True), start):
            held = list(answer.values())
            served = [None if given[name] is None else int(given[name]) for name in answer]
            if served != held:
                raise SpecError(f"checked item {at}: the saved model gives SID {served}, the tables hold {held}")


if __name__ == "__main__":
    run_stage("export", "export", ExportConfig, ["encoder", "sids"], export)
