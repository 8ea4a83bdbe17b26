import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config import load
from castalia.config.derive import derive
from castalia.config.fields import fields
from castalia.config.load import from_yaml
from castalia.config.render import explain, flat, scalar, to_yaml
from castalia.config.yaml12 import parse_value, parse_yaml
from castalia.errors import UserError


@pytest.mark.parametrize("comments", [False, True])
def test_all_of_it_is_written_and_read_back(comments: bool) -> None:
    config, _ = derive(load([], ["optimizer.lr=6e-4", "name='no'", "data.train_paths=[a, 'b: c', \"\\x85\"]"]), 300)
    text = to_yaml(config, comments)
    assert from_yaml(text).model_dump() == config.model_dump()
    assert list(parse_yaml(text, "f").values) == list(type(config).model_fields)
    assert to_yaml(from_yaml(text), comments) == text
    assert "  lr: 0.0006" in text
    assert "  eps: 1.0e-8" in text
    assert 'name: "no"' in text


def test_a_long_list_is_written_line_by_line() -> None:
    paths = [f"data/{'x' * 20}/{i}" for i in range(9)]
    config = load([], [f"data.train_paths=[{', '.join(paths)}]"])
    assert "  train_paths:\n    - data/" in to_yaml(config)
    assert from_yaml(to_yaml(config)).data.train_paths == paths


@given(st.floats(allow_nan=False))
def test_floats_are_exact_and_have_a_point(value: float) -> None:
    text = scalar(value)
    again = parse_value(text)
    assert (again, type(again)) == (value, float)
    assert "." in text  # so that YAML 1.1 takes it for a number as well


@given(
    st.text(st.characters(codec="utf-8"))
    | st.sampled_from(["", "null", "1e5", "0x1", "true", "~", "a: b", "#", "-", "é"])
)
def test_texts_are_exact(value: str) -> None:
    line = f"key: {scalar(value)}"
    assert parse_yaml(line, "f").values == {"key": value}
    assert parse_yaml(f"key: {scalar([value, value])}  # comment", "f").values == {"key": [value, value]}
    assert len(line.splitlines()) == 1


def test_explaining_a_key() -> None:
    config, _ = derive(from_yaml("optimizer:\n  lr: 6e-4\ntraining: {tokens: 16385}", "f.yml"))
    assert explain(config, "optimizer.lr").splitlines() == [
        "optimizer.lr = 0.0006",
        "  meaning  peak learning rate",
        "  class    numerics: changes the function computed; a resumed run refuses a change",
        "  type     float, > 0",
        "  default  0.001",
        "  from     f.yml:2",
    ]
    steps = explain(config, "training.steps")
    assert steps.startswith("training.steps = 2 steps\n")
    assert "while schedule.decay_steps stays" in steps
    assert steps.endswith("from     derived")
    assert explain(config, "name").endswith("from     the default")
    assert "optimizer.betas" in explain(config, "optimizer")


def test_every_key_can_be_explained() -> None:
    config = load([])
    for key, info in fields():
        assert info.description is not None
        assert info.description in explain(config, key)
    assert list(flat(config)) == [key for key, _ in fields()]


def test_explaining_what_is_not_there() -> None:
    with pytest.raises(UserError, match="there is no key 'optimizer.lrr'; did you mean 'optimizer.lr'"):
        explain(load([]), "optimizer.lrr")
