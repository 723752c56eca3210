"""Commit a small directory, and create files that are not regular."""

import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sidestack.infra.commit import committing
from sidestack.infra.distributed import World


def commit(out: Path, world: World, text: str = "hello") -> Path:
    """Commit a directory with a text file and a Parquet file, and return it."""
    with committing(out, world, stage="test", key="k", inputs={"a": "1"}, facts={"b": 2}) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "a.txt").write_text(text)
        pq.write_table(pa.table({"x": [1, 2, 3]}), staging / "t.parquet")
    return out


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # a socket's whole path must be short


IRREGULAR = {
    "link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "FIFO": os.mkfifo,
    "socket": make_socket,
    "directory": os.mkdir,
}
"""Functions that create a file that is not regular, by the kind that error messages name."""
