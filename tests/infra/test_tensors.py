"""Writing tensors: they are restored, the file is readable by other users, and a full disk raises OSError."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidestack.infra.tensors import write_tensors


def test_views_are_restored_and_the_file_is_readable_by_others(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    before = os.umask(0o022)
    try:
        write_tensors({"whole": whole, "turned": whole.T}, tmp_path / "some.safetensors")
    finally:
        os.umask(before)
    found = load_file(tmp_path / "some.safetensors")
    assert torch.equal(found["whole"], whole) and torch.equal(found["turned"], whole.T)
    assert stat.S_IMODE((tmp_path / "some.safetensors").stat().st_mode) == 0o644


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_full_disk_raises_os_error() -> None:
    with pytest.raises(OSError) as error:
        write_tensors({"some": torch.zeros(1 << 16)}, Path("/dev/full"))
    assert error.value.errno == errno.ENOSPC
