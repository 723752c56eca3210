"""A stage whose output is a URL is preempted or killed and resumes on another machine."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from sidestack.infra.manifest import verify
from sidestack.infra.preemption import read_mark
from sidestack.infra.remote.urls import local_path, mirror
from tests.infra.jobs import LIMIT_S, job, ranks_of, wait_for
from tests.infra.test_preemption import STAGE, settings
from tests.object_store import SECRET, Bucket

WORK = {"steps": 60, "seconds": 0.1, "checkpoint_every": 7}


@pytest.mark.whole
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_another_machine_resumes_from_the_last_checkpoint_in_the_store(
    bucket: Bucket, tmp_path: Path, number: signal.Signals
) -> None:
    url, log = f"{bucket.url}/runs/out", tmp_path / "job.log"
    arguments = [url if word == str(Path(url)) else word for word in settings(Path(url), **WORK)]

    def checkpoints() -> list[str]:
        return [key for key in bucket.keys("runs/out.checkpoint/") if key.endswith("/manifest.json")]

    with job(STAGE, arguments, log) as process:
        wait_for(checkpoints, process, log)
        for one in [process.pid, *(ranks_of(process.pid) if number == signal.SIGKILL else ())]:
            os.kill(one, number)
        process.wait(LIMIT_S)
    shutil.rmtree(mirror())
    mark = read_mark(local_path(url))
    assert (mark is not None) == (number == signal.SIGTERM), log.read_text()
    with job(STAGE, arguments, log) as process:
        assert process.wait(LIMIT_S) == 0, log.read_text()
    assert SECRET not in log.read_text()
    resumed_from = verify(local_path(url)).facts["resumed_from"]
    assert resumed_from == mark.step if mark is not None else resumed_from >= 7
    kept = {key.split("/")[1] for key in bucket.keys("runs/")}
    assert kept == {"out"}  # no preemption mark, no checkpoint
    with job(STAGE, settings(tmp_path / "whole", **WORK), log) as process:
        assert process.wait(LIMIT_S) == 0, log.read_text()
    assert (local_path(url) / "sum.txt").read_text() == (tmp_path / "whole/sum.txt").read_text()
