import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.yaml12 import Origin, parse_value, parse_yaml, read_yaml
from castalia.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4),
        ("1e5", 1e5),
        ("1.0e8", 1e8),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5E+3", -1500.0),
        ("+12", 12),
        ("1_000_000", 1_000_000),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("null", None),
        ("~", None),
        ("", None),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("1e", "1e"),
        ("_1", "_1"),
        ("'5'", "5"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("[1, a, null]", [1, "a", None]),
        ("{a: 6e-4}", {"a": 6e-4}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(f"key: {text}", "f.yml").values["key"]
    assert parsed == value
    assert type(parsed) is type(value)
    assert parse_value(text) == value


def test_not_a_number_is_read() -> None:
    assert math.isnan(parse_yaml("key: .nan", "f.yml").values["key"])


def test_json_and_flow_mappings_are_yaml() -> None:
    text = '{\n  "num-layers": 12, # as GPT-NeoX ships them\n  "fused": False,\n}'
    document = parse_yaml(text, "f.yml")
    assert document.values == {"num-layers": 12, "fused": False}
    assert document.origin("fused") == Origin("f.yml", 3)


def test_lines_of_nested_keys() -> None:
    document = parse_yaml("a:\n  b: 1\n\n  c: {d: 2}\n", "f.yml")
    assert document.lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 4, ("a", "c", "d"): 4}
    assert str(document.origin("a", "b")) == "f.yml:2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f.yml:3: key 'a' was given before, at line 1: keep one"),
        ("a:\n  b: 1\n  b: 2", "f.yml:3: key 'b' was given before, at line 2: keep one"),
        ("a: [", "f.yml:1: not valid YAML"),
        ("a: 1\n b: 2", "f.yml:2: not valid YAML"),
        ("- 1", "f.yml:1: expected `key: value` pairs"),
        ("? [a]\n: 1", "f.yml:1: a key must be a plain word"),
        ("a: !!python/name:os.system", "f.yml:1: the tag"),
        ("a: !!int x", "f.yml:1: 'x' cannot be read as int"),
        ("a: !!bool maybe", "f.yml:1: 'maybe' cannot be read as bool"),
        (f"a: {'1' * 5000}", "cannot be read as int"),
        ("a: &x [*x]", "f.yml:1: an alias repeats itself without end"),
        ("a: *x", "f.yml:1: not valid YAML: found undefined alias"),
        ("[" * 2000, "f.yml: not valid YAML: nested too deeply"),
        ("a: \x00", "f.yml: not valid YAML"),
        ('a: "\\UFFFFFFFF"', "f.yml: not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML: but found another document"),
    ],
)
def test_bad_text_is_one_sentence_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_yaml(text, "f.yml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_aliases_may_be_used_but_not_to_exhaust_memory() -> None:
    assert parse_yaml("a: &x [1]\nb: *x", "f.yml").values == {"a": [1], "b": [1]}
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    with pytest.raises(UserError, match="alias"):
        parse_yaml(bomb, "f.yml")


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        read_yaml(tmp_path / "absent.yml")
    with pytest.raises(UserError, match="is a folder"):
        read_yaml(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml("a\0b.yml")
    (tmp_path / "latin.yml").write_bytes(b"a: \xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 3\)"):
        read_yaml(tmp_path / "latin.yml")
    (tmp_path / "empty.yml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yml").values == {}


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_yaml(text, "f.yml")
    except UserError as error:
        assert str(error)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63) + 1, 2**63 - 1)
        | st.floats(allow_nan=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_pyyaml_writes_in_full_is_read_back(value: object) -> None:
    # Tagged and quoted, PyYAML's output means the same in YAML 1.1 and 1.2.
    text = yaml.safe_dump({"key": value}, default_style='"', allow_unicode=True)
    assert parse_yaml(text, "f.yml").values == {"key": value}
