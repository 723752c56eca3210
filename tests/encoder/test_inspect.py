"""`encoder.inspect`: digits, siblings and neighbours, compared with a slow count, and the printed output."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.inspect import EXAMPLES, inspect, main
from sidestack.encoder.signals import signal_batch
from sidestack.infra.errors import DataError
from sidestack.infra.snapshot import read_dataset
from tests.encoder.fabricated import BARE_ITEMS, item_table

CPU = torch.device("cpu")


def test_siblings_and_neighbours_match_a_slow_count(dataset: Path, encoder: Path) -> None:
    bundle = load_bundle(encoder, CPU)
    batch = signal_batch(item_table(), bundle.signals)
    with torch.inference_mode():
        digits_ND = bundle.model.digits(batch)
        units_NH = normalize(bundle.model.quantizer.decode(digits_ND).float(), dim=1)
    for sheet in inspect(bundle, read_dataset(dataset), [0, 333]):
        others = [i for i in range(len(batch)) if i != sheet.item and i not in BARE_ITEMS]
        own = digits_ND[sheet.item].tolist()
        assert sheet.digits == own
        assert sheet.sid == bundle.spec.pack(digits_ND[sheet.item : sheet.item + 1])[0].tolist()
        for length, (number, some) in sheet.siblings.items():
            wanted = [i for i in others if digits_ND[i, :length].tolist() == own[:length]]
            assert (number, some) == (len(wanted), wanted[:EXAMPLES])
        assert [*sheet.siblings] == [2, 4, 6]
        cosines = sorted((float(units_NH[i] @ units_NH[sheet.item]) for i in others), reverse=True)[:EXAMPLES]
        assert [cosine for cosine, _ in sheet.neighbours] == pytest.approx(cosines, abs=1e-5)
        assert 0 < len(sheet.losses) <= len(bundle.signals.names)


def test_error_names_an_item_that_is_missing_or_has_no_signal(dataset: Path, encoder: Path) -> None:
    bundle, snapshot = load_bundle(encoder, CPU), read_dataset(dataset)
    with pytest.raises(DataError, match="item 70000: is not in"):
        inspect(bundle, snapshot, [0, 70000])
    with pytest.raises(DataError, match=f"item {BARE_ITEMS[0]}: has no signal, so its SID is null"):
        inspect(bundle, snapshot, [BARE_ITEMS[0]])


def test_command_prints_one_sheet_per_item(dataset: Path, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--encoder", str(encoder), "--dataset", str(dataset), "5", "7"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("item ")] == ["item 5", "item 7"]
    assert sum(line.startswith("nearest: ") for line in lines) == 2
    assert sum(line.startswith("loss by signal: ") for line in lines) == 2
    with pytest.raises(SystemExit):
        main(["--encoder", str(encoder), "--dataset", str(dataset), "70000"])
    assert capsys.readouterr().err.startswith("inspect: error: item 70000: is not in")
