"""Stage `ranker_export`: a trained ranker, its SIDs and their encoders as one MLflow model that answers requests.

    python -m ranker.export --model DIR --dataset DIR [--input encoder.sid=DIR] --out DIR

`--model` is the output of a ranker's stage, `--dataset` the snapshot that it was trained on, `encoder.NAME` the encoder
of each set of SIDs that the arm takes. Before the commit, the saved copy is loaded again and answers requests made from
held-out rows: its predictions must equal the ranker's own. Only rank 0 works.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidestack.encoder.bundle import ENCODER_FILE, WEIGHTS_FILE, load_bundle
from sidestack.encoder.serving import require_same_encoder
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import MAP_FILE
from sidestack.encoder.signals import stored_precisions
from sidestack.infra.distributed import raise_on_all_ranks
from sidestack.infra.errors import DataError, SpecError
from sidestack.infra.manifest import read_manifest
from sidestack.infra.registration import register_if_named
from sidestack.infra.sealed import seal
from sidestack.infra.served import load_served, save_served
from sidestack.infra.snapshot import CONTENT, Dataset, read_dataset
from sidestack.infra.stage import StageRun, run_stage, with_inputs
from sidestack.infra.tensors import write_tensors
from sidestack.ranker.bundle import RankerBundle, open_bundle
from sidestack.ranker.bundle_description import Description, require_sids
from sidestack.ranker.constants import read_constants
from sidestack.ranker.export_config import RankerExportConfig
from sidestack.ranker.features import dataset_sids
from sidestack.ranker.row_maps import read_row_maps, write_row_maps
from sidestack.ranker.serving.config import (
    CONSTANTS_FILE,
    MODEL_FOLDER,
    NETWORK_FILE,
    SERVED_FILE,
    TABLES_FILE,
    ServedConfig,
    ServedSids,
)
from sidestack.ranker.serving.model import CODEBOOK, EMBEDDINGS, ServedRanker, file_digests
from sidestack.ranker.serving.reference import Reference, check, read_reference
from sidestack.ranker.serving.tables import stored_table

VERSION_FOLDER = "version"
PACKAGES = ("encoder", "infra", "ranker")
QUANTIZED_ROWS = 40
"""Tables of fewer bits are measured on this many times `checked_rows`."""


def export(run: StageRun[RankerExportConfig]) -> None:
    """Save the model in `run.out`, check it and register it; the body of the stage.

    Raises:
        DataError: an input is not what it should be. StageError: the registry refuses.
        SpecError: ranker, SIDs and encoders do not fit each other, or the saved model's predictions differ.
    """
    with raise_on_all_ranks(run.world.committing, "exporting the ranker"):
        if run.world.is_main:
            _export(run)


def _export(run: StageRun[RankerExportConfig]) -> None:
    config, bundle = run.config, open_bundle(run.inputs["model"])
    dataset, described = read_dataset(run.inputs["dataset"]), bundle.description
    require_sids(described, dataset_sids(dataset), f"dataset={run.inputs['dataset']}")
    version = run.out / VERSION_FOLDER
    version.mkdir()
    sids = {name: _write_sids(run, dataset, name, spec, version) for name, spec in described.sids.items()}
    _write_weights(bundle, config, version)
    maps = read_row_maps(bundle.path, described.config.model.admission)
    write_row_maps(maps, version)
    scales = _write_constants(dataset, described, version)
    served = ServedConfig(
        ranker=described, tables=config.tables, sids=sids, scales=scales, max_candidates=config.max_candidates,
        max_history=config.max_history, lineage=_lineage(run, sids), files=file_digests(version),
    )  # fmt: skip
    (version / SERVED_FILE).write_bytes(seal(served))
    rows = config.checked_rows * (1 if config.tables == "float32" else QUANTIZED_ROWS)
    reference = read_reference(dataset, described, run.inputs["model"], rows)
    found = check(ServedRanker(version), reference, config)
    model = run.out / MODEL_FOLDER
    save_served(
        model, Path(__file__).parent / "serving" / "mlflow_model.py", "sidestack.ranker.serving.model:load_answers",
        {VERSION_FOLDER: version}, PACKAGES,
        input_example=reference.requests[:1], metadata={"lineage": served.lineage},
    )  # fmt: skip
    shutil.rmtree(version)  # the MLflow model has a copy
    _require_equal_answer(model, reference, found.largest_difference)
    number = register_if_named(model, config.registered_model, config.alias, _tags(served), "ranker_export", run.log)
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    run.log.info(f"ranker_export: {len(reference.p_TN[0]):,} held-out rows answered, {found}; {size:,} bytes")
    run.log.summary({"bytes": size, "registered": number, "lineage": served.lineage, **found._asdict()})
    run.facts["lineage"] = served.lineage


def _lineage(run: StageRun[RankerExportConfig], sids: Mapping[str, ServedSids]) -> dict[str, str]:
    """Return the digests of a version's inputs; a directory that is not committed has none."""
    manifests = {name: read_manifest(path) for name, path in run.inputs.items()}
    trained = manifests["model"]
    found = {name: manifest.digest for name, manifest in manifests.items()}
    found |= {f"trained_on.{name}": digest for name, digest in trained.inputs.items()}
    found |= {f"revision.{name}": one.revision for name, one in sids.items()}
    return {**found, "config": str(trained.facts.get("config", "")), "key": trained.key}


def _write_sids(
    run: StageRun[RankerExportConfig], dataset: Dataset, name: str, spec: SidSpec, version: Path
) -> ServedSids:
    """Copy a set's encoder and its map from id to SID into the version.

    Raises:
        DataError: the encoder is not given, or a partition is missing. SpecError: it is another encoder.
    """
    folder = run.inputs.get(f"encoder.{name}")
    if folder is None:
        raise DataError(f"--input encoder.{name}=DIR: is missing: the arm takes the SIDs {name!r}")
    bundle = load_bundle(folder, torch.device("cpu"))
    require_same_encoder(bundle.spec, spec)
    content = CONTENT[spec.entity]
    table = dataset.snapshot.sids[name].table(name, content)
    entries = dataset.partitions(table)
    served = ServedSids(
        spec=spec,
        revision=bundle.revision,
        rows=sum(entry.facts["new"] for entry in entries),
        signals=bundle.signals,
        stored=stored_precisions(dataset, bundle.signals),
    )
    (version / served.map_file).parent.mkdir(exist_ok=True)
    with (version / served.map_file).open("wb") as out:
        for entry in entries:
            dataset.verify_partition(entry)
            with (dataset.store / entry.path / MAP_FILE).open("rb") as part:
                shutil.copyfileobj(part, out)
    (version / served.encoder_folder).mkdir(parents=True)
    for file in (ENCODER_FILE, WEIGHTS_FILE):
        shutil.copyfile(folder / file, version / served.encoder_folder / file)
    return served


def _write_weights(bundle: RankerBundle, config: RankerExportConfig, version: Path) -> None:
    network, tables = bundle.weights()
    write_tensors(network, version / NETWORK_FILE)
    stored: dict[str, Tensor] = {}
    while tables:
        table, rows_ND = tables.popitem()
        stored |= {f"{table}/{part}": tensor for part, tensor in stored_table(rows_ND, config.tables).items()}
    write_tensors(stored, version / TABLES_FILE)


def _write_constants(dataset: Dataset, described: Description, version: Path) -> dict[str, float]:
    """Write codebooks and raw embeddings, and return the scales of new items' embeddings, by signal."""
    constants = read_constants(dataset, described.features(dataset.spec).constants)
    named: dict[str, Tensor] = {f"{CODEBOOK}.{name}": book for name, book in constants.codebooks.items()}
    named |= {
        # A snapshot may have grown: only the rows that the ranker has. The row after them stands for unknown ids.
        f"{EMBEDDINGS}.{entity}": rows_IE[: described.spec.content(entity).rows]
        for entity, rows_IE in constants.embeddings.items()
    }
    write_tensors(named, version / CONSTANTS_FILE)
    return dict(constants.scales.get("item", {}))


def _require_equal_answer(model: Path, reference: Reference, largest_difference: float) -> None:
    """Load the saved MLflow model as a server does, and check that it answers a request as the version did."""
    request = reference.requests[0]
    (answer,) = load_served(model).predict([request])
    p_TN = np.array([*answer["probabilities"].values()])
    apart = np.abs(p_TN - reference.p_TN[:, : len(request["candidates"])]).max()
    if not apart <= largest_difference + 1e-6:
        raise SpecError(f"{model}: the saved model's answer is {apart:.2g} from the ranker's prediction")


def _tags(served: ServedConfig) -> dict[str, str]:
    """Return the tags of the registered version."""
    tags = {f"sidestack.{key}": value for key, value in served.lineage.items()}
    tags |= {f"sidestack.sids.{sid}": one.spec.fingerprint for sid, one in served.sids.items()}
    return {**tags, "sidestack.arm": served.ranker.config.arm}


def main() -> None:
    """Run the stage from the command line."""
    argv = with_inputs(sys.argv[1:], ("model", "dataset"))
    inputs = ["model", "dataset"]
    run_stage("ranker_export", "ranker_export", RankerExportConfig, inputs, export, argv, optional=["encoder.*"])


if __name__ == "__main__":
    main()
