"""deepy.py's command line: what it stands for, and that it trains and generates."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from castalia.cli import main
from castalia.cli.deepy import ENVIRONMENT, arguments, reported, settings
from castalia.config import load, origins
from castalia.data.prepare import prepare
from castalia.data.tokenizer import load_tokenizer

MODEL: dict[str, Any] = {
    "num-layers": 1,
    "hidden-size": 16,
    "num-attention-heads": 2,
    "seq-length": 16,
    "max-position-embeddings": 64,
    "pos-emb": "rotary",
    "train-iters": 3,
    "train_micro_batch_size_per_gpu": 2,
    "eval-iters": 1,
    "tokenizer_type": "HFTokenizer",
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
}


def parsed(*argv: str, **environment: str) -> tuple[list[str], list[str]]:
    parser = argparse.ArgumentParser()
    arguments(parser)
    return settings(parser.parse_intermixed_args(argv), environment)


@pytest.mark.parametrize(
    ("argv", "files", "overrides"),
    [
        (["train.py", "a.yml"], ["a.yml"], []),
        (["train.py", "a", "b.json", "c.v2"], ["a.yml", "b.json", "c.v2.yml"], []),
        (["./train.py", "-d", "configs", "a", "b.yml"], ["configs/a.yml", "configs/b.yml"], []),
        (["train.py", "a", "--conf_dir", "c", "--wandb_group", "1e3"], ["c/a.yml"], ['wandb_group="1e3"']),
        (["train.py", "-H", "hosts", "a"], ["a.yml"], ['hostfile="hosts"']),
        (["train.py", "a", "--autotuning", "tune"], ["a.yml"], ['autotuning_run="tune"']),
        (
            ["generate.py", "a", "-i", "in", "-o", "out", "--iteration", "20"],
            ["a.yml"],
            ["iteration=20", 'sample_input_file="in"', 'sample_output_file="out"'],
        ),
        (
            ["eval.py", "a", "--eval_tasks", "lambada", "piqa", "--eval_results_prefix", "p"],
            ["a.yml"],
            ['eval_tasks=["lambada", "piqa"]', 'eval_results_prefix="p"'],
        ),
        (
            ["train.py", "a", "--wandb_team", "t", "--wandb_run_name", "n"],
            ["a.yml"],
            ['wandb_team="t"', 'wandb_run_name="n"'],
        ),
    ],
)
def test_what_a_command_line_stands_for(argv, files, overrides) -> None:
    assert parsed(*argv) == (files, overrides)


def test_the_hostfile_of_the_environment_gives_way_to_the_option() -> None:
    assert parsed("train.py", "a", DLTS_HOSTFILE="env") == (["a.yml"], ['hostfile="env"'])
    assert parsed("train.py", "a", "-H", "cli", DLTS_HOSTFILE="env") == (["a.yml"], ['hostfile="cli"'])


def test_variables_that_are_set_are_reported() -> None:
    assert reported({"HOME": "x", "MASTER_ADDR": "host", "LOGLEVEL": ""}) == [
        ("MASTER_ADDR", ENVIRONMENT["MASTER_ADDR"])
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with files as GPT-NeoX's users have them, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text("the cat sat on the mat. " * 10)
    prepare([tmp_path / "texts"], tmp_path / "tokens", load_tokenizer("byte"))
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "model.yml").write_text(json.dumps(MODEL, indent=1))
    paths = {"data-path": "tokens", "split": "80,20,0", "save": "ckpt", "load": "ckpt", "checkpoint-factor": 2}
    (configs / "paths.yml").write_text(json.dumps(paths))
    return tmp_path


def test_options_are_overrides_of_the_same_keys(folder) -> None:
    (folder / "hosts").write_text("here slots=4\n")
    files, overrides = parsed("train.py", "-d", "configs", "model", "paths", "-H", "hosts")
    config = load(files, overrides)
    assert config.model_dump() == load(["configs/model.yml", "configs/paths.yml"], ["hostfile=hosts"]).model_dump()
    assert config.training.batch_size == 8
    assert str(origins(config)["training.steps"]) == "configs/model.yml:8"


def test_training_and_generating(folder, capsys, monkeypatch) -> None:
    conf = ["-d", "configs", "model", "paths"]
    monkeypatch.setenv("LOGLEVEL", "ERROR")
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    assert main(["deepy", "train.py", *conf]) == 0
    out, err = capsys.readouterr()
    assert "MASTER_ADDR is set: taken" in err
    assert "loss" not in out
    assert (folder / "ckpt" / "checkpoints" / "latest").read_text().strip() == "step-00000003"

    Path("prompts.txt").write_text("the cat\n\n  the mat\n")
    assert main(["deepy", "generate.py", *conf, "-i", "prompts.txt", "--iteration", "2"]) == 0
    assert "2 continuations: prompts.txt.output.jsonl" in capsys.readouterr().out
    records = [json.loads(line) for line in Path("prompts.txt.output.jsonl").read_text().splitlines()]
    assert [record["context"] for record in records] == ["the cat", "the mat"]
    assert main(["deepy", "generate.py", *conf, "--iteration", "1"]) == 2
    assert "there is no checkpoint of step 1: choose one of those there (2, 3)" in capsys.readouterr().err
    for record in records:
        assert record.keys() == {"context", "text", "length", "finished", "message", "duration_seconds"}
        assert record["length"] <= 64

    more = {"text_gen_type": "unconditional", "num_samples": 2, "maximum_tokens": 5, "temperature": 1.0}
    Path("configs/text.yml").write_text(json.dumps(more))
    assert main(["deepy", "generate.py", *conf, "text", "-o", "samples.txt"]) == 0
    first, second = map(json.loads, Path("samples.txt").read_text().splitlines())
    assert first["context"] == second["context"] == ""
    assert first["text"] != second["text"]


def test_interactive_generation(folder, capsys, monkeypatch) -> None:
    import io

    conf = ["-d", "configs", "model", "paths", "text"]
    Path("configs/text.yml").write_text(json.dumps({"text_gen_type": "interactive", "maximum_tokens": 3}))
    assert main(["train", "--quiet", "--no-report", "configs/model.yml", "configs/paths.yml"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nthe mat\n"))
    capsys.readouterr()
    assert main(["deepy", "generate.py", *conf, "-i", "unread.txt"]) == 0
    out, err = capsys.readouterr()
    assert out.count("Generated Text: ") == 2
    assert "sample_input_file unread.txt is not read, since text_gen_type is interactive" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrain.py", "configs/model"], "deepy knows train.py, generate.py and eval.py"),
        (["train.py", "configs/none"], "configs/none.yml: no such configuration file"),
        (["train.py", "configs/model", "-H", "none"], "--hostfile none does not exist: mend the name"),
        (["train.py", "configs/model", "--autotuning", "run"], "'autotuning_run' ('run') asks for"),
        (
            ["eval.py", "configs/model", "--eval_tasks", "piqa"],
            "eval.py needs 'load', the run to evaluate",
        ),
        (["generate.py", "configs/model"], "generate.py needs 'load'"),
        (["generate.py", "-d", "configs", "model", "paths", "odd"], "'top_k' is -1: give a number from 0 on"),
        (["generate.py", "-d", "configs", "model", "paths"], "ckpt is not a run directory"),
        (
            ["generate.py", "-d", "configs", "model", "paths", "-i", "nothing.txt"],
            "sample_input_file: nothing.txt cannot be read",
        ),
    ],
)
def test_what_goes_wrong_is_said_in_one_sentence(folder, capsys, argv, message) -> None:
    (folder / "configs" / "odd.yml").write_text('{"top_k": -1}')
    assert main(["deepy", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_options_are_not_abbreviated(folder, capsys) -> None:
    assert main(["deepy", "train.py", "configs/model", "--wandb_g", "x"]) == 2


def test_eval_is_the_verb_with_its_settings(folder, monkeypatch) -> None:
    called = []
    monkeypatch.setattr("castalia.cli.main", lambda argv: called.append(argv) or 0)
    from castalia.cli.deepy import _evaluate

    files = ["configs/model.yml", "configs/paths.yml"]
    assert _evaluate(files, ['eval_tasks=["piqa", "arc_*"]', 'eval_results_prefix="p"', "iteration=3"]) == 0
    (argv,) = called
    assert argv[:5] == ["evaluate", "ckpt", "--tasks", "piqa", "arc_*"]
    assert argv[argv.index("--few-shot") + 1] == "0" and argv[argv.index("--step") + 1] == "3"
    assert argv[argv.index("--output") + 1].startswith("p_eval_results_")
