"""Configuration files, overrides, their validation, and digests of configurations."""

import itertools
from pathlib import Path

import pytest

from sidestack.infra.config import (
    VERSION,
    Config,
    Inside,
    digest,
    load_file,
    load_section,
    parse,
    parse_written,
    to_yaml,
)
from sidestack.infra.errors import ConfigError


class Inner(Config):
    rate: float = 0.1


class Below(Config):
    path: Inside


class Outer(Config):
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_overrides_are_parsed_as_yaml_and_reach_nested_keys(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "encoder: {inner: {rate: 0.5}}")
    config = load_section(Outer, file, "encoder", ["encoder.inner.rate=1e-2", "encoder.names=[a, b]"])
    assert config == Outer(inner=Inner(rate=0.01), names=("a", "b"))


def test_absent_section_means_defaults(tmp_path: Path) -> None:
    assert load_section(Outer, write(tmp_path / "run.yaml", "prepare: {}"), "encoder") == Outer()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"rte": 1}}, r"here\.inner\.rte: unknown key; did you mean 'rate'\? \(value: 1\)"),
        ({"zebra": 1}, r"here\.zebra: unknown key \(value: 1\)"),
        ({"inner": {"rate": "fast"}}, r"here\.inner\.rate: .*number.*'fast'"),
        ({"names": 3}, r"here\.names: .*tuple.*3"),
    ],
)
def test_error_names_key_value_and_rule(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Outer, values, "here")


ALIASES = "encoder:\n  a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"  {name}: &{name} [{', '.join(['*' + before] * 8)}]\n" for before, name in itertools.pairwise("abcdefgh")
)
"""A few hundred characters that expand to 8 ** 8 values."""


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("encodr: {}", [], "unknown section 'encodr'"),
        ("1: {}\nfoo: {}", [], "unknown section 1"),
        ("encoder: {inner: {rate: .inf}}", [], r"encoder\.inner\.rate: inf is no finite number"),
        ("encoder: {}", ["encoder.shares=[0.5, -.inf]"], r"encoder\.shares\.1: -inf is no finite number"),
        ("encoder: {}", ["encoder.rate=.nan"], r"encoder\.rate: nan is no finite number"),
        ("encoder: {a: .inf, b: [.nan]}", [], r"encoder\.a: inf [\s\S]*encoder\.b\.0: nan is no finite number"),
        ("encoder: {on: 1, 7: 2}", [], r"encoder\.True: the key True is of type bool; put it in quotes[\s\S]*key 7"),
        ("encoder: {a: 9223372036854775808}", [], r"encoder\.a: needs more than 64 bits"),
        ("encoder: {a: %s}" % ("9" * 5000), [], r"line 1: '999+\.\.\.9+' is no int \(Exceeds the limit"),
        ('encoder: {a: "\\0"}', [], r"encoder\.a: '\\x00' has a NUL character"),
        ('encoder: {"\\ud800": 1}', [], r"encoder\.\\ud800': the key has a NUL character or half of a surrogate"),
        ("encoder: {}", ["encoder.name=a\udcff"], r"half of a surrogate pair|not valid YAML"),
        ("encoder: {}", ["encoder.a\udcff=1"], r"half of a surrogate pair"),
        ("encoder: {a: 2024-13-01}", [], r"line 1: '2024-13-01' is no timestamp \(month must be in 1\.\.12\)"),
        ("a: 1\nencoder: !!int x", [], r"line 2: 'x' is no int"),
        ("encoder: !!timestamp x", [], r"line 1: 'x' is no timestamp"),
        ("encoder: !!python/object/apply:os.system [exit]", [], r"could not determine a constructor"),
        ("encoder: {? [1] : 2}", [], r"unhashable key"),
        ("encoder: " + "[" * 3000, [], r"nested too deeply"),
        ("encoder: " + "[" * 40 + "]" * 40, [], r"encoder\.0\.0\.\.\.: nested more than 32 levels deep"),
        ("encoder: &a {b: *a}", [], r"encoder\.b\.b\.\.\.: nested more than 32 levels deep"),
        (ALIASES, [], r"holds more than 1,000,000 values"),
        ("[1, 2]", [], "must be a mapping"),
        ("a: [", [], "not valid YAML"),
        ("encoder: {}", ["encoder.rate"], "must look like"),
        ("encoder: {rate: 1}", ["encoder.rate.x=1"], "'rate' is a value"),
        ("encoder: {}\nranker: {}\nencoder: {}", [], "key 'encoder' occurs twice, on lines 1 and 3"),
        ("encoder: {inner: {rate: 1, rate: 2}}", [], "key 'rate' occurs twice, on lines 1 and 1"),
        ("encoder: {}", ["encoder.inner={rate: 1, rate: 2}"], "key 'rate' occurs twice"),
    ],
)
def test_invalid_file_or_override_is_refused(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_file(write(tmp_path / "run.yaml", text), overrides)


def test_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    text = "encoder: {inner: &inner {rate: 0.5}}\nranker: {inner: {<<: *inner, rate: 0.7}}"
    assert load_section(Outer, write(tmp_path / "run.yaml", text), "ranker").inner.rate == 0.7


def test_file_is_read_as_utf8(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes("encoder: {names: [größe]}".encode())
    assert load_section(Outer, file, "encoder").names == ("größe",)
    file.write_bytes("encoder: {names: [größe]}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml: is not UTF-8 \(byte 20"):
        load_file(file)


def test_byte_order_mark_is_allowed_and_utf16_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbfencoder: {names: [a]}")
    assert load_section(Outer, file, "encoder").names == ("a",)
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        file.write_bytes("encoder: {}".encode(encoding))
        with pytest.raises(ConfigError, match=r"run\.yaml: (is not UTF-8|not valid YAML)"):
            load_file(file)


@pytest.mark.parametrize("section", ["[1]", "-1", "abc", "3.5", "2024-01-01"])
def test_section_that_is_not_a_mapping_is_named(tmp_path: Path, section: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: encoder: must be a mapping, is \w+"):
        load_section(Outer, write(tmp_path / "run.yaml", f"encoder: {section}"), "encoder")


@pytest.mark.parametrize("number", ["inf", "-Infinity", "nan"])
def test_non_finite_number_is_refused_as_text(number: str) -> None:
    with pytest.raises(ConfigError, match=r"here\.rate: .*finite number"):
        parse(Inner, {"rate": number}, "here")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/x", "a\nb"])
def test_path_that_leaves_its_directory_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"here\.path: must be a relative path without \.\."):
        parse(Below, {"path": path}, "here")
    assert parse(Below, {"path": "sids/sid/0a/part=00000"}, "here").path == "sids/sid/0a/part=00000"


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml: cannot be read"):
        load_file(tmp_path / "absent.yaml")


def test_digest_ignores_key_order_but_not_values() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(Outer()) != digest(Outer(inner=Inner(rate=0.2)))


def test_resolved_yaml_reads_back_as_the_same_config(tmp_path: Path) -> None:
    config = Outer(inner=Inner(rate=0.3), names=("x",))
    file = write(tmp_path / "run.yaml", to_yaml({"encoder": config.model_dump(mode="json")}))
    assert load_section(Outer, file, "encoder") == config


class Placed(Config):
    rate: float = 0.1
    cache: Path = Path(".cache")

    def identity(self) -> dict[str, object]:
        return self.model_dump(mode="json", exclude={"cache"})


def test_digest_leaves_out_the_place_of_a_cache() -> None:
    assert digest(Placed(cache=Path("/elsewhere"))) == digest(Placed())
    assert digest(Placed(rate=0.2)) != digest(Placed())


def test_fields_that_an_older_version_lacks_get_their_defaults() -> None:
    assert parse_written(Outer, {"names": ["x"]}, "a.json", "0.0.1") == Outer(names=("x",))


@pytest.mark.parametrize("values", [{"names": ["x"], "later": 1}, {"inner": {"rate": "fast"}}, [1]])
def test_error_for_values_of_another_version_names_both_versions(values: object) -> None:
    with pytest.raises(ConfigError, match=rf"was written by sidestack 9\.9, this is sidestack {VERSION}"):
        parse_written(Outer, values, "a.json", "9.9")
    with pytest.raises(ConfigError, match="was written by an unknown version of sidestack"):
        parse_written(Outer, values, "a.json", None)
