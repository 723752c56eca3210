"""The script that times the parts of a step on a GPU, tested on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

from sidestack.benchmarks.step_parts import main
from sidestack.infra.code import ROOT


def test_quick_run_times_every_part(tmp_path: Path) -> None:
    main(["--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "step_parts.json").read_text())["rows"]
    parts = ["lookup of the history", "history", "forward", "step"]
    assert [row["part"] for row in rows] == [*parts, *parts, "unpack x Omega"]
    assert all(row["ms"] > 0 for row in rows)
    assert all(("of_copy" in row) == (row["part"] == "unpack x Omega") for row in rows)


def test_script_imports_neither_torchrec_nor_fbgemm() -> None:
    code = "import sys; sys.modules.update(torchrec=None, fbgemm_gpu=None); import sidestack.benchmarks.step_parts"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
