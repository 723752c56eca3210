"""A job without its output's lease commits nothing."""

import json
from pathlib import Path

import pytest

from sidestack.infra.commit import commit_alone
from sidestack.infra.errors import CommitError
from sidestack.infra.lease import VARIABLE, lease_file, lease_of, require_lease
from sidestack.infra.manifest import is_committed


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an output's path whose lease this process holds."""
    out = tmp_path / "it's an $output"
    monkeypatch.setenv(VARIABLE, lease_of(out, "mine"))
    grant(out, "mine")
    return out


def grant(out: Path, token: str) -> None:
    lease_file(out).write_text(json.dumps({"token": token}))


def test_process_without_a_driver_needs_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    require_lease()


def test_holder_of_the_lease_commits(out: Path) -> None:
    with commit_alone(out, stage="ranker"):
        pass
    assert is_committed(out)


def test_job_superseded_before_it_began_writes_nothing(out: Path) -> None:
    grant(out, "another's")
    with pytest.raises(CommitError, match="no longer holds the lease"):
        with commit_alone(out, stage="ranker"):
            pytest.fail("the body ran")
    assert not out.exists()


@pytest.mark.parametrize("left", ['{"token": "another"}', "{}", "[]", "", None])
def test_job_that_loses_its_lease_commits_neither_output_nor_checkpoint(out: Path, left: str) -> None:
    for place in (out, out.with_name("output.checkpoint") / "step-1"):
        grant(out, "mine")
        with pytest.raises(CommitError, match="no longer holds the lease"):
            with commit_alone(place, stage="ranker") as directory:
                (directory / "file").write_text("late")
                if left is None:
                    lease_file(out).unlink()
                else:
                    lease_file(out).write_text(left)
        assert not place.exists()
