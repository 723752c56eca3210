"""docs/scale.md's arithmetic is computed from the results, and missing results are named."""

import json
from pathlib import Path

from sidestack.benchmarks.record import Row
from sidestack.benchmarks.scale import BEGIN, END, PAGE, Results, arithmetic, replace_between_marks
from sidestack.encoder.budget import LARGEST_BATCH


def write(folder: Path, name: str, rows: list[Row]) -> None:
    folder.mkdir(exist_ok=True)
    made = {"date": "2024-01-01", "device": "a machine"}
    (folder / f"{name}.json").write_text(json.dumps({"conditions": made, "rows": rows}))


def training(ranks: int, rate: float) -> Row:
    batch = LARGEST_BATCH
    return {"what": "training, default, float32", "ranks": ranks, "batch": batch, "items_per_second": rate}


def test_arithmetic_follows_from_the_results(tmp_path: Path) -> None:
    write(tmp_path, "training", [training(1, 10_000.0), training(2, 15_000.0)])
    stage = {"rows": 5_000_000, "rows_per_second": 50_000.0, "peak_mib": 432.1, "bytes_a_row": 150.0}
    write(tmp_path, "materialize", [{"what": "stage", **stage}, {"what": "program", **stage}])
    text = arithmetic(Results(tmp_path), Results(tmp_path / "gpu"))
    assert "55.6 hours of one rank" in text  # 1e9 x 2 epochs / 10,000 / 3600
    assert "5.6 hours of one rank" in text
    assert "1.50 x one rank" in text
    assert "| 432 MiB |" in text
    assert "| 150.0 GB |" in text
    assert "3.0 GB; 768.0 GB" in text
    assert "a machine" in text
    assert "run `python -m benchmarks.unpack`" in text
    assert "run `python -m benchmarks.encoding`" in text


def test_page_says_not_measured_without_gpu_results(tmp_path: Path) -> None:
    assert "**Not measured.**" in arithmetic(Results(tmp_path), Results(tmp_path / "gpu"))
    write(tmp_path / "gpu", "training", [training(1, 1e6)])
    text = arithmetic(Results(tmp_path), Results(tmp_path / "gpu"))
    assert "**Not measured.**" not in text
    assert "0.6 hours of one rank" in text


def test_page_has_marks_and_text_around_them_is_kept() -> None:
    page = PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    once = replace_between_marks(page, "new figures")
    assert replace_between_marks(once, "new figures") == once
    assert once.replace("new figures", "").split(BEGIN)[0] == page.split(BEGIN)[0]
    assert once.endswith(page.split(END)[1])
