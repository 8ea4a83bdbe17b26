from pathlib import Path

import pytest

from castalia.config import load, origins
from castalia.config.load import from_yaml, known_keys, nearest
from castalia.config.render import to_yaml
from castalia.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refused(text: str) -> str:
    with pytest.raises(UserError) as error:
        from_yaml(text, "f.yml")
    return str(error.value)


def test_no_file_is_the_default_run() -> None:
    config = load([])
    assert config.training.steps == 1000
    assert origins(config) == {}
    assert load([], ["training.batch_size=4"]).training.steps == 1000


def test_files_merge_in_order_and_say_where_values_come_from(write) -> None:
    a = write("a.yml", "training:\n  steps: 10\n")
    b = write("b.yml", "training:\n\n  batch_size: 4\nmodel:\n")
    config = load([a, b], ["optimizer.lr=3e-4", "data.path=null"])
    assert (config.training.steps, config.training.batch_size, config.optimizer.lr) == (10, 4, 3e-4)
    said = {key: str(origin) for key, origin in origins(config).items()}
    assert said == {
        "training.steps": f"{a}:2",
        "training.batch_size": f"{b}:3",
        "optimizer.lr": "command line",
        "data.path": "command line",
    }


def test_the_same_key_in_two_files_names_both_places(write) -> None:
    a, b = write("a.yml", "name: a\n"), write("b.yml", "\nname: b\n")
    with pytest.raises(UserError) as error:
        load([a, b])
    assert str(error.value) == (
        f"{b}:2: 'name' was given already at {a}:1: remove one, or name the first file as `base:`"
    )


def test_a_base_is_overridden_and_keeps_its_lines(write) -> None:
    a = write("a.yml", "name: a\noptimizer:\n  lr: 1e-3\n  eps: 1e-6\n")
    b = write("b.yml", "base: a.yml\noptimizer:\n  lr: 2e-3\n")
    c = write("c.yml", "base: b.yml\nname: c\n")
    config = load([c])
    assert (config.name, config.optimizer.lr, config.optimizer.eps) == ("c", 2e-3, 1e-6)
    assert str(origins(config)["optimizer.eps"]) == f"{a}:4"
    assert str(origins(config)["optimizer.lr"]) == f"{b}:3"
    # Naming the base on the command line as well changes nothing.
    assert load([a, b, c]).model_dump() == config.model_dump()


def test_an_error_in_a_base_names_the_base(write) -> None:
    a = write("a.yml", "\noptimizer: {lrr: 1}\n")
    b = write("b.yml", "base: a.yml\n")
    with pytest.raises(UserError, match="unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'") as error:
        load([b])
    assert str(error.value).startswith(f"{a}:2:")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("me.yml", "leads back to me.yml"),
        ("{}", "must be the name of one file"),
        ("absent.yml", "names absent.yml as its `base`"),
        ('"a\\0b"', "is not the name of a file"),
    ],
)
def test_bad_bases(write, base: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load([write("me.yml", f"base: {base}\n")])


def test_a_circle_of_bases(write) -> None:
    write("a.yml", "base: b.yml")
    with pytest.raises(UserError, match="leads back"):
        load([write("b.yml", "base: a.yml")])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "an override is written key=value"),
        ("=3", "an override is written key=value"),
        ("optimizer.lrr=3", "command line: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("optimizer=3", "command line: 'optimizer' is a section: give one of its keys"),
        ("optimizer.lr=fast", "command line: optimizer.lr: input should be a valid number, got 'fast'"),
        ("optimizer.lr=-1", "command line: optimizer.lr: input should be greater than 0, got -1"),
        ("training.steps=1e3", "command line: training.steps: input should be a valid integer, got 1000.0"),
        ("training.tokens=1", "give one of training.steps and training.tokens"),
    ],
)
def test_bad_overrides(write, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load([write("a.yml", "training: {steps: 5}")], [override])
    assert message in str(error.value)


def test_an_override_may_take_a_value_away(write) -> None:
    config = load([write("a.yml", "training: {steps: 5}")], ["training.steps=null", "training.tokens=1_000"])
    assert (config.training.steps, config.training.tokens) == (None, 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizr: {lr: 1}", "f.yml:1: unknown key 'optimizr'; did you mean 'optimizer'?"),
        (
            "model:\n  num_layer: 3",
            "f.yml:2: unknown key 'model.num_layer'; did you mean 'model.num_layers'?",
        ),
        (
            "model:\n  hiden_size: 3",
            "f.yml:2: unknown key 'model.hiden_size'; did you mean 'model.hidden_size'?",
        ),
        ("training: {lr: 3}", "did you mean 'optimizer.lr'?"),
        ("xyzzy: 3", "f.yml:1: unknown key 'xyzzy'; `castalia config show` lists the known keys"),
        ("optimizer: 3", "f.yml:1: 'optimizer' is a section: give its keys indented below it"),
        ("model: {norm: 3}", "f.yml:1: model.norm: input should be a valid string, got 3"),
        ("training: {steps: true}", "training.steps: input should be a valid integer, got True"),
        ("optimizer: {betas: [1, 2, 3]}", "f.yml:1: optimizer.betas: list should have at most 2 items"),
        ("optimizer: {betas: [0.9, x]}", "f.yml:1: optimizer.betas.1: input should be a valid number"),
        ("optimizer: {lr: .inf}", "f.yml:1: optimizer.lr: input should be a finite number"),
        ("schedule: {type: cosin}", "f.yml:1: schedule.type: input should be 'cosine'"),
        ("optimizer.lr: 1\noptimizer: {lr: 2}", "f.yml:2: 'optimizer.lr' was given already at f.yml:1"),
        ("evaluation: {batches: 0}\ncheckpoint: {interval: 0}", "(and 1 more)"),
        (f"model: {{hidden_size: {'8' * 20}}}", "f.yml:1: '88888888888888888888' cannot be read as int"),
    ],
)
def test_what_is_wrong_is_said_with_file_line_and_remedy(text: str, message: str) -> None:
    assert message in refused(text)


def test_a_section_without_keys_says_nothing() -> None:
    assert from_yaml("optimizer:\nmodel: {}").model_dump() == load([]).model_dump()


def test_every_key_is_its_own_nearest() -> None:
    keys = known_keys()
    assert len(set(keys)) == len(keys)
    assert all(nearest(key, keys) == key for key in keys)
    assert nearest("qqqqqq", keys) is None


def test_lists_of_settings_survive_being_written_and_name_unknown_keys(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text("optimizer:\n  groups:\n    - {match: 'a: b', lr: 2.0}\n    - match: x\n      weight_decay: 0.0\n")
    config = load([path])
    (tmp_path / "b.yml").write_text(to_yaml(config))
    assert load([tmp_path / "b.yml"]).optimizer == config.optimizer
    path.write_text("optimizer: {groups: [{match: x, lrr: 1.0}]}\n")
    with pytest.raises(UserError, match=r"optimizer\.groups\.0: unknown key 'lrr'"):
        load([path])
