"""Stage `materialize`: encode items and users, and write SID columns that are row-aligned with the tables.

One encoder makes one set of SIDs. With several encoders (`--input encoder.<name>=DIR`), each makes a set under its own
name, so that a ranker can compare them on the same rows. The SIDs of one set and codebook are a *generation*. Their
columns are partitions of the store, row-aligned with the items' (or users') parts, with the events (the advertised
item) and with the requests (the history, or the user). Only missing partitions are made; nothing else is rewritten. The
stage's output is its input snapshot plus these partitions, and each set's frozen codebook and description
(`encoder.sid_file`).

With one encoder, a published SID never changes: an item that a later part revises keeps the SID of the part that added
it. So a date's columns depend only on the parts that added its items, and not on later ones.

A refreshed encoder (`encoder.refresh`) is in the generation of the encoder it started from, but may assign another SID
to the same item. With `--input published=DIR`, an earlier output of this stage, the columns of that snapshot's parts
and dates are taken over as they are, and only new items are encoded. With `materialize.published=move`, or without that
input, all items are encoded, into a folder of its own.

All ranks encode a part together, one file per rank at a time; one rank writes a date's columns. Reading, encoding and
writing overlap, one row group each. Memory is therefore a few row groups, plus the pages of the maps from id to SID in
the page cache.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sidestack.encoder.config import ENCODER_INPUT, MaterializeConfig
from sidestack.encoder.generation.dates import write_dates
from sidestack.encoder.generation.parts import write_parts
from sidestack.encoder.generation.sets import MaterializeWork, SidSetWork, open_sid_set
from sidestack.encoder.published import encoder_of, moved_shares, with_encodings
from sidestack.encoder.sid.spec import DEFAULT_NAME
from sidestack.encoder.sid_codebook import write_codebook
from sidestack.encoder.sid_file import write_sid_file
from sidestack.infra.config import parse, plain
from sidestack.infra.distributed import raise_on_all_ranks
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.snapshot import SidSet, read_dataset, write_snapshot
from sidestack.infra.stage import StageRun, run_stage
from sidestack.infra.store import Store, in_order


def materialize(run: StageRun[MaterializeConfig]) -> None:
    """Make the SID columns that the store lacks, and write the snapshot with them into `run.out`.

    Raises:
        ConfigError: a prefix does not fit its encoder's digits, or belongs to no encoder.
        DataError: a row breaks the tables' contract, the dataset does not match the encoder, or published SIDs cannot
            be kept.
        SpecError: an encoder's weights do not match its revision. CommitError: a partition was altered.
        PreemptedError: a rank was asked to stop; on every rank. Partitions that were committed are kept.
    """
    started = time.monotonic()
    with raise_on_all_ranks(run.world, "opening dataset and encoders"):
        work = _open_work(run)
    encoded = sum(write_parts(run, work, one) for one in work.sets)
    encoding = time.monotonic() - started
    entries = [entry for one in work.sets for entry in write_dates(run, work, one)]
    with raise_on_all_ranks(run.world, "closing the snapshot"):
        if run.world.is_main:
            _write_outputs(run, work, entries, {"encoded": encoded, "encoding_seconds": encoding, "started": started})


def _open_work(run: StageRun[MaterializeConfig]) -> MaterializeWork:
    dataset = read_dataset(run.inputs["dataset"])
    earlier = read_dataset(run.inputs["published"]) if "published" in run.inputs else None
    paths = {
        name.removeprefix(ENCODER_INPUT): path for name, path in run.inputs.items() if name.startswith(ENCODER_INPUT)
    }
    for name in run.config.prefix_lengths:
        if name not in paths and name != DEFAULT_NAME:
            raise ConfigError(
                f"materialize.prefix_lengths.{name}: no encoder of this name; given are {', '.join(paths)}"
            )
    for name in paths:
        if name in dataset.snapshot.sids:
            raise DataError(f"{dataset.path}: has SIDs {name!r} already; materialize a snapshot without them")
    sets = tuple(open_sid_set(run, dataset, earlier, name, path) for name, path in paths.items())
    return MaterializeWork(dataset, Store(dataset.store), sets, run.config.batch_size)


def _write_outputs(
    run: StageRun[MaterializeConfig],
    work: MaterializeWork,
    dates: Sequence[PartitionEntry],
    measured: Mapping[str, float],
) -> None:
    """Write the snapshot, the codebooks, the sets' descriptions and the summary."""
    before = work.dataset.snapshot
    parts = [entry for one in work.sets for entry in one.parts]
    partitions = in_order([*before.partitions, *parts, *dates])
    sids = {**before.sids, **{one.spec.name: _with_encodings(one) for one in work.sets}}
    changed = {"store": str(work.store.path), "sids": sids, "partitions": tuple(partitions)}
    write_snapshot(run.out, run.out, work.dataset.spec, parse(type(before), {**dict(before), **changed}, "snapshot"))
    for one in work.sets:
        write_codebook(run.out, one.spec, one.bundle.model.quantizer.codewords().detach())
        write_sid_file(run.out, one.spec, one.listed.columns)
    found = {one.spec.name: _summary(run, work, one) for one in work.sets}
    run.facts["fingerprints"] = {one.spec.name: one.spec.fingerprint for one in work.sets}
    run.facts["revisions"] = {one.spec.name: one.bundle.revision for one in work.sets}
    seconds = time.monotonic() - measured["started"]
    run.log.summary(
        {
            **{one.content: work.dataset.spec.content(one.spec.entity).rows for one in work.sets},
            "sids": found,
            "encoded": measured["encoded"],
            "encoding_seconds": measured["encoding_seconds"],
            "items_per_second": measured["encoded"] / max(measured["encoding_seconds"], 1e-9),
            "writing_seconds": seconds - measured["encoding_seconds"],
            "seconds": seconds,
        }
    )
    for one in work.sets:
        of_set = found[one.spec.name]
        run.log.info(
            f"materialize: {one.spec.name}: {of_set['rows']:,} {one.content}, {of_set['distinct']:,} different SIDs"
            f" ({of_set['unique_share']:.1%}), {of_set['null']:,} null{_moved_words(one, of_set['moved'])}"
        )


def _with_encodings(one: SidSetWork) -> SidSet:
    """Return a set's entry in the snapshot: each part was encoded by the set's encoder, unless it was taken over."""
    made = {}
    for part in one.parts:
        if part.facts["new"]:
            first = part.facts["first"]
            is_reused = (one.content, part.slice) in one.reusable
            made[first] = encoder_of(one.listed, first) if is_reused else one.bundle.revision
    return with_encodings(one.listed, made)


def _moved_words(one: SidSetWork, moved: Mapping[int, float]) -> str:
    """Return the log line on published SIDs, which a refreshed encoder may change."""
    if moved:
        return f"; of those published {moved[max(moved)]:.1%} were moved, {moved[1]:.1%} in the first digit"
    if one.published is None and one.bundle.revision != one.spec.fingerprint:
        return "; no SIDs of its generation were given as published, so the refreshed encoder encoded all"
    return ""


def _summary(run: StageRun[MaterializeConfig], work: MaterializeWork, one: SidSetWork) -> dict[str, Any]:
    maps = one.maps(work.store)
    null, distinct, _ = maps.count(run.out)
    return {
        "rows": maps.rows,
        "null": null,
        "distinct": distinct,
        "unique_share": distinct / max(maps.rows - null, 1),
        "moved": {} if one.published is None else moved_shares(one.published, maps, one.spec),
        "spec": plain(one.spec),
    }


if __name__ == "__main__":
    inputs = ["dataset", f"{ENCODER_INPUT}*"]
    run_stage("materialize", "materialize", MaterializeConfig, inputs, materialize, optional=["published"])
