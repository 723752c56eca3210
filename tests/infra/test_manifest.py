"""Manifests: digests, damaged, edited and outdated ones, and verification of a committed directory."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

import sidestack.infra.files
import sidestack.infra.manifest
from sidestack.infra.commit import committing
from sidestack.infra.config import digest
from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import CommitError
from sidestack.infra.manifest import MANIFEST, read_manifest, verify
from sidestack.infra.sealed import OWN_DIGEST
from tests.infra.committed import IRREGULAR, commit


def test_digest_depends_on_contents_only(tmp_path: Path, world: World) -> None:
    first, second, third = (commit(tmp_path / name, world, text) for name, text in zip("abc", "xxy", strict=True))
    assert read_manifest(first).digest == read_manifest(second).digest != read_manifest(third).digest


def test_digest_leaves_out_the_summary(tmp_path: Path, world: World) -> None:
    for name, seconds in (("a", "1.5"), ("b", "2.5")):
        with committing(tmp_path / name, world, stage="test") as staging:
            (staging / "data.txt").write_text("same")
            (staging / "summary.json").write_text(f'{{"seconds": {seconds}}}')
    first, second = verify(tmp_path / "a"), verify(tmp_path / "b")
    assert first.digest == second.digest
    assert first.files["summary.json"] != second.files["summary.json"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def rename_in_resealed_manifest(out: Path, name: str, other: str) -> None:
    """Replace a file's name in a manifest, whose digest is updated; copy the file there if the new name is outside."""
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][other] = manifest["files"].pop(name)
    if other.startswith("../"):
        shutil.copy(out / name, out / other)
    del manifest[OWN_DIGEST]
    (out / MANIFEST).write_text(json.dumps({**manifest, OWN_DIGEST: digest(manifest)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: flip(out / "t.parquet"), r"t\.parquet: SHA-256 .* was altered"),
        (lambda out: os.truncate(out / "t.parquet", 10), r"t\.parquet: has 10 bytes, manifest.json says"),
        (lambda out: (out / "part/a.txt").unlink(), r"a\.txt: is named in manifest.json but missing"),
        (lambda out: (out / "new").write_text(""), r"new: is not in manifest.json"),
        (lambda out: rename_in_resealed_manifest(out, "t.parquet", "../t.parquet"), r"t\.parquet: is"),
        (
            lambda out: rename_in_resealed_manifest(out, "t.parquet", "/etc/hostname"),
            r"t\.parquet: is not in manifest.json",
        ),
        (lambda out: (out / MANIFEST).write_text("{}"), "not a sidestack manifest"),
        (lambda out: (out / MANIFEST).unlink(), "not a committed directory"),
    ],
)
def test_verify_finds_damage(tmp_path: Path, world: World, damage: object, message: str) -> None:
    out = commit(tmp_path / "out", world)
    damage(out)  # type: ignore[operator]
    with pytest.raises(CommitError, match=message):
        verify(out)


@pytest.mark.parametrize(
    ("field", "value"),
    [("key", "l"), ("stage", "other"), ("facts", {"b": 3}), ("inputs", {}), ("created", "2020"), ("versions", {})],
)
def test_edited_manifest_is_found(tmp_path: Path, field: str, value: object) -> None:
    file = commit(tmp_path / "out", ALONE) / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(CommitError, match=r"manifest\.json: is not of the digest that it holds"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"1", b"[" * 100_000, b'{"facts": NaN}'])
def test_file_that_is_not_a_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    file = commit(tmp_path / "out", ALONE) / MANIFEST
    file.write_bytes(content)
    with pytest.raises(CommitError, match=r"manifest\.json: (not a sidestack manifest|cannot be read)"):
        read_manifest(tmp_path / "out")


def test_bit_flip_in_a_manifest_is_found_or_changes_no_value(tmp_path: Path) -> None:
    file = commit(tmp_path / "out", ALONE) / MANIFEST
    written, content = read_manifest(tmp_path / "out"), file.read_bytes()
    num_found = 0
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            assert read_manifest(tmp_path / "out") == written  # a character of white space became another one
        except CommitError:
            num_found += 1
    assert num_found > 0.95 * len(content)


def test_manifest_of_the_previous_format_is_read_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidestack.infra.manifest, "_warned_without_digest", [])
    for name in ("a", "b"):
        file = commit(tmp_path / name, ALONE) / MANIFEST
        values = {**json.loads(file.read_text()), "format": "sidestack/1"}
        del values["own_digest"]
        file.write_text(json.dumps(values))
        assert verify(tmp_path / name).key == "k"
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == 1 and "a/manifest.json: was committed by an earlier version" in warnings
    file.write_text(json.dumps({**values, "format": "sidestack/2"}))
    with pytest.raises(CommitError, match="format 'sidestack/2' does not go with its own_digest"):
        read_manifest(tmp_path / "b")


def test_directory_of_another_stage_or_key_is_refused(tmp_path: Path) -> None:
    out = commit(tmp_path / "out", ALONE)
    assert verify(out, stage="test", key="k") == read_manifest(out)
    for check in (verify, read_manifest):
        with pytest.raises(CommitError, match="out: is of stage 'test', not of 'ranker'"):
            check(out, stage="ranker", key="k")
        with pytest.raises(CommitError, match="out: is of key 'k', not of ''"):
            check(out, key="")


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("name", ["part/a.txt", MANIFEST])
def test_irregular_file_is_named(tmp_path: Path, kind: str, name: str) -> None:
    out = commit(tmp_path / "out", ALONE)
    (out / name).rename(tmp_path / "elsewhere")
    IRREGULAR[kind](out / name)
    rule = (
        f"{name}: is (a {kind}|named in manifest.json but missing)" if kind == "directory" else f"{name}: is a {kind}"
    )
    with pytest.raises(CommitError, match=rule):
        verify(out)


def test_link_inside_a_committed_directory_is_refused_and_a_link_to_it_is_followed(tmp_path: Path) -> None:
    out = commit(tmp_path / "out", ALONE)
    (tmp_path / "link").symlink_to(out)
    assert verify(tmp_path / "link").key == "k"
    (out / "part").rename(tmp_path / "elsewhere")
    (out / "part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CommitError, match="part: is a link"):
        verify(out)


def test_unreadable_file_raises_commit_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = commit(tmp_path / "out", ALONE)

    def broken(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(sidestack.infra.files, "_hash", broken)
    with pytest.raises(CommitError, match=r"part/a\.txt: cannot be read: Input/output error"):
        verify(out)
