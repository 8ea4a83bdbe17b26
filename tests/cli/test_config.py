"""`castalia config`, as a user types it."""

import json
from pathlib import Path

import pytest

from castalia.cli import main
from castalia.config import load
from castalia.config.load import from_yaml

NEOX = """{
  "num-layers": 2, "hidden-size": 32, "num-attention-heads": 4, "seq-length": 16, "max-position-embeddings": 16,
  "pos-emb": "rotary", "train-iters": 1000, "train_micro_batch_size_per_gpu": 2,
  "optimizer": {"type": "Adam", "params": {"lr": 6e-4}}, "steps_per_print": 10,
}"""


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def said(capsys, *argv: str, code: int = 0) -> str:
    assert main(["config", *argv]) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


def test_show(write, capsys) -> None:
    path = write("a.yml", "optimizer: {lr: 6e-4}\n")
    plain, commented = said(capsys, "show", path), said(capsys, "show", path, "--comments")
    assert from_yaml(plain).model_dump() == from_yaml(commented).model_dump() == load([path]).model_dump()
    assert "#" not in plain
    assert "  lr: 0.0006  # peak learning rate" in commented
    assert json.loads(said(capsys, "show", path, "--json")) == load([path]).model_dump()


def test_check(write, capsys) -> None:
    path = write("neox.yml", NEOX)
    text = said(capsys, "check", path, "--settings-only")
    assert "steps_per_print: DeepSpeed is not used\n" in text
    assert "schedule.decay_steps = 1000: " in text
    assert text.endswith("the configuration is right; data, tokenizer, device and memory were not looked at\n")
    answer = json.loads(said(capsys, "check", path, "--settings-only", "--json"))
    assert answer["config"]["schedule"]["decay_steps"] == 1000
    assert "num_layers: became model.num_layers 2" in answer["notes"]
    assert any(line.startswith("model.head_dim = 8") for line in answer["derivation"])
    wrong = write("wrong.yml", "optimizer:\n  lrr: 1\n")
    assert said(capsys, "check", wrong, code=2) == (
        f"castalia: {wrong}:2: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?\n"
    )


def test_explain(write, capsys) -> None:
    path = write("a.yml", "optimizer: {lr: 6e-4}\n")
    assert said(capsys, "explain", "optimizer.lr", path).endswith(f"from     {path}:1\n")
    assert said(capsys, "explain", "optimizer.lr").endswith("from     the default\n")
    text = said(capsys, "explain", "schedule.decay_steps", path, "training.steps=7")
    assert "  here     schedule.decay_steps = 7: the decay lasts as long as the training" in text


@pytest.mark.parametrize("minimal", [[], ["--minimal"]])
@pytest.mark.parametrize("more", [[], ["train_iters=7", "data.path=d"], ["training.steps=null", "training.tokens=512"]])
def test_convert_writes_the_same_configuration(write, capsys, tmp_path, minimal, more) -> None:
    source, target = write("neox.yml", NEOX), str(tmp_path / "ours.yml")
    assert said(capsys, "convert", source, *more, *minimal, "--output", target) == ""
    assert load([target]).model_dump() == load([source], more).model_dump()
    text = Path(target).read_text()
    assert text == said(capsys, "convert", source, *more, *minimal)
    assert "#   steps_per_print: DeepSpeed is not used\n" in text
    assert ("  rpe_num_buckets: 32" in text) == (not minimal)


def test_convert_of_a_native_file_has_no_remarks(write, capsys) -> None:
    path = write("a.yml", "name: a\noptimizer: {lr: 6e-4}\n")
    text = said(capsys, "convert", path, "--minimal")
    assert text == "version: 1\nname: a\n\ntraining:\n  steps: 1000\n\noptimizer:\n  lr: 0.0006\n"


def test_convert_cannot_write(write, capsys, tmp_path) -> None:
    message = said(capsys, "convert", write("a.yml", "name: a\n"), "--output", str(tmp_path), code=2)
    assert message == f"castalia: {tmp_path} cannot be written: Is a directory\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.yml"]


def test_diff_says_what_each_difference_changes(write, capsys) -> None:
    a, b = write("a.yml", "name: a\noptimizer: {lr: 6e-4}\n"), write("b.yml", "name: b\noptimizer: {lr: 6e-4}\n")
    assert said(capsys, "diff", a, a) == "no difference\n"
    text = said(capsys, "diff", a, "performance.threads=2", b, "optimizer.lr=1e-3", "data.path=x")
    assert text.splitlines() == [
        "numerics: changes what is computed; a resumed run refuses it",
        "  data.path: null -> x",
        "  optimizer.lr: 0.0006 -> 0.001",
        "performance: changes only rounding or speed",
        "  performance.threads: 2 -> null",
        "cosmetic: changes neither what is computed nor its speed",
        "  name: a -> b",
    ]
    answer = json.loads(said(capsys, "diff", a, b, "--json"))
    rows = [{"key": "name", "a": "a", "b": "b", "class": "cosmetic"}]
    assert answer == {"a": a, "b": b, "differences": rows, "same_function": True}
    assert json.loads(said(capsys, "diff", a, b, "optimizer.lr=1", "--json"))["same_function"] is False


def test_diff_takes_a_native_and_a_gptneox_file_and_the_folder_of_a_run(write, capsys, tmp_path) -> None:
    neox = write("neox.yml", NEOX)
    (tmp_path / "run").mkdir()
    said(capsys, "convert", neox, "--output", str(tmp_path / "run" / "config.yaml"))
    assert said(capsys, "diff", neox, str(tmp_path / "run")) == "no difference\n"
    assert main(["plan", str(tmp_path / "run")]) == 2
    assert f"that of the run in it is {tmp_path / 'run' / 'config.yaml'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"), [(["b.yml", "c.yml"], "3 were named"), (["optimizer.lr=1"], "1 were named")]
)
def test_diff_is_between_two(write, capsys, more, message) -> None:
    assert message in said(capsys, "diff", write("a.yml", "name: a\n"), *more, code=2)


def test_diff_has_no_override_before_a_file(write, capsys) -> None:
    text = said(capsys, "diff", "optimizer.lr=1", write("a.yml", "name: a\n"), code=2)
    assert "'optimizer.lr=1' stands before the first file" in text


def test_schema(capsys, tmp_path) -> None:
    text = said(capsys, "schema")
    assert json.loads(text)["properties"]["model"]["properties"]["num_layers"]["default"] == 6
    said(capsys, "schema", "--output", str(tmp_path / "schema.json"))
    assert (tmp_path / "schema.json").read_text() == text
