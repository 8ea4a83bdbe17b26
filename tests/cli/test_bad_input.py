"""Wrong input gets one sentence and exit code 2, and leaves nothing that looks finished."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import yaml

from castalia.cli import main

WORDS = "the cat sat on a mat and saw that it was not a hat but an old rat".split()


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a good corpus, tokenizer, data set and configuration."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choice(WORDS) for _ in range(60))} for _ in range(60)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["prepare", "good.jsonl", "--tokenizer", "byte", "--output", "tokens"]) == 0
    values = {
        "output": "run",
        "data": {"path": "tokens", "split": "80,20,0", "seq_length": 32},
        "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4},
        "training": {"steps": 4, "batch_size": 4},
        "evaluation": {"batches": 1},
        "performance": {"threads": 1, "peak_flops": 1e11},
    }
    (tmp_path / "run.yml").write_text(yaml.safe_dump(values))
    return tmp_path


def refused(capsys, argv, *words):
    """The verb fails with code 2 and one sentence that holds the words."""
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("castalia: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    for word in words:
        assert word in lines[0], (word, lines[0])


def no_data(folder, prefix="out"):
    assert not [p.name for p in folder.glob(f"{prefix}.*") if p.suffix in (".bin", ".idx", ".json")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.jsonl", None, ["missing.jsonl"]),
        ("empty.jsonl", b"", ["empty"]),
        ("empty.txt", b"", []),
        ("latin1.txt", b"caf\xe9 au lait", ["latin1.txt", "UTF-8", "3"]),
        ("latin1.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n', ["latin1.jsonl", "UTF-8"]),
        ("broken.jsonl", b'{"text": "ok"}\n{"text": "open\n', ["broken.jsonl:2"]),
        ("key.jsonl", b'{"content": "ok"}\n', ["key.jsonl:1", "content", "--text-key"]),
        ("strange.docx", b"x", ["strange.docx"]),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00", ["cut.jsonl.gz"]),
    ],
)
def test_corpus(work, capsys, name, content, words):
    if content is not None:
        (work / name).write_bytes(content)
    refused(capsys, ["prepare", name, "--tokenizer", "byte", "--output", "out"], *words)
    no_data(work)


def test_output_exists(work, capsys):
    before = (work / "tokens.idx").read_bytes()
    refused(capsys, ["prepare", "good.jsonl", "--tokenizer", "byte", "--output", "tokens"], "tokens", "--overwrite")
    assert (work / "tokens.idx").read_bytes() == before


def test_tokenizer_that_is_none(work, capsys):
    (work / "tokenizer.json").write_text("{}")
    refused(capsys, ["prepare", "good.jsonl", "--tokenizer", "tokenizer.json", "--output", "out"], "tokenizer.json")
    refused(capsys, ["prepare", "good.jsonl", "--tokenizer", "nowhere", "--output", "out"], "nowhere")
    no_data(work)


def test_truncated_bin(work, capsys):
    content = (work / "tokens.bin").read_bytes()
    (work / "tokens.bin").write_bytes(content[:-10])
    refused(capsys, ["train", "run.yml"], "tokens.bin", str(len(content)), str(len(content) - 10))


def test_index_of_another_version(work, capsys):
    content = bytearray((work / "tokens.idx").read_bytes())
    content[9] = 2
    (work / "tokens.idx").write_bytes(content)
    refused(capsys, ["train", "run.yml"], "tokens.idx", "another version (2")


def test_truncated_index(work, capsys):
    content = (work / "tokens.idx").read_bytes()
    (work / "tokens.idx").write_bytes(content[:60])
    refused(capsys, ["train", "run.yml"], "tokens.idx")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.vocab_size=200", ["257", "200"]),
        ("model.max_position_embeddings=16", ["seq_length", "max_position_embeddings", "16"]),
        ("model.num_attention_heads=5", ["hidden_size", "num_attention_heads"]),
        ("model.num_kv_heads=3", ["num_kv_heads"]),
        ("training.micro_batch_size=3", ["batch_size", "micro_batch_size"]),
        ("data.path=nowhere", ["nowhere"]),
        ("data.split=0,1,0", ["split"]),
        ("model.num_layer=2", ["model.num_layer", "did you mean 'model.num_layers'"]),
        ("training.steps=many", ["training.steps"]),
        ("optimizer.type=adamx", ["optimizer.type", "adamw"]),
        ("model.norm=batch", ["model.norm"]),
        ("performance.device=cuda:9", ["performance.device"]),
        ("performance.device=tpu", ["performance.device", "leave it out"]),
        ("tokenizer.path=nowhere.json", ["nowhere.json"]),
        ("model.activation=sine", ["model.activation", "swiglu"]),
        # Slips of the hand.
        ("model.num_layers=100000000", ["model.num_layers", "beyond 10000"]),
        ("model.hidden_size=10000000000", ["more than can be addressed"]),
        ("training.steps=1000000000000000", ["training.steps", "memory"]),
        ("training.steps=99999999999999999999", ["command line: training.steps:", "cannot be read"]),
        ("performance.threads=100000000", ["performance.threads"]),
    ],
)
def test_settings(work, capsys, override, words):
    refused(capsys, ["train", "run.yml", override], *words)
    refused(capsys, ["config", "check", "run.yml", override], *words)
    assert not list(work.glob("run/checkpoints/step-*"))


def test_configuration_file(work, capsys):
    refused(capsys, ["train", "nowhere.yml"], "nowhere.yml")
    (work / "bad.yml").write_text("training: {steps: 4\n")
    refused(capsys, ["train", "bad.yml"], "bad.yml:")
    (work / "twice.yml").write_text("optimizer:\n  lr: 1e-3\n  lr: 2e-3\n")
    refused(capsys, ["train", "twice.yml"], "twice.yml:3", "lr")
    (work / "empty.yml").write_text("# nothing\n")
    refused(capsys, ["config", "check", "empty.yml"], "empty.yml: holds no settings")
    (work / "other.yml").write_text("training: {steps: 5}\n")
    refused(capsys, ["train", "run.yml", "other.yml"], "other.yml:1", "training.steps", "run.yml:")


def test_another_tokenizer_than_the_datas(work, capsys):
    assert main(["tokenizer", "train", "good.jsonl", "--vocab-size", "300", "--output", "bpe.json"]) == 0
    refused(capsys, ["train", "run.yml", "tokenizer.path=bpe.json"], "tokens", "bpe.json")


def test_generation(work, capsys):
    refused(capsys, ["generate", "nowhere", "--prompt", "x"], "nowhere")
    assert main(["train", "run.yml", "--quiet"]) == 0
    refused(capsys, ["generate", "run", "--prompt", "x" * 30, "--max-tokens", "20"], "32")
    refused(capsys, ["generate", "run", "--prompt", "x", "--temperature", "-1"], "temperature")
    refused(capsys, ["generate", "run", "--prompt", "x", "--step", "3"], "3")
    shutil.rmtree(work / "run" / "checkpoints")
    refused(capsys, ["generate", "run", "--prompt", "x"], "run")


def test_verbs(work, capsys):
    capsys.readouterr()
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert main(["report", "nowhere"]) == 2
    assert main(["plan", "nowhere.yml"]) == 2
    assert main(["corpora", "get", "nothing", "--output", "x"]) == 2


def test_other_peoples_files_are_not_overwritten(work, capsys):
    (work / "mine.json").write_text('{"model": {}}')
    for more in ([], ["--overwrite"]):
        refused(capsys, ["prepare", "good.jsonl", "--tokenizer", "byte", "--output", "mine", *more], "mine.json")
    assert (work / "mine.json").read_text() == '{"model": {}}'
    refused(capsys, ["prepare", "good.jsonl", "--tokenizer", "byte", "--output", "out/"], "out/")


def test_a_file_where_a_folder_is_needed(work, capsys):
    refused(capsys, ["corpora", "get", "stdlib", "--output", "good.jsonl"], "good.jsonl")
    refused(capsys, ["tokenizer", "train", "good.jsonl", "--output", "good.jsonl/x.json"], "good.jsonl")


def test_counts_below_one(work, capsys):
    assert main(["train", "run.yml", "--quiet"]) == 0
    refused(capsys, ["evaluate", "run", "--data", "tokens", "--max-tokens", "-1"], "--max-tokens")
    refused(capsys, ["evaluate", "run", "--data", "tokens", "--stride", "0"], "--stride")
    refused(capsys, ["train", "run.yml", "training.steps=0"], "training.steps")
    refused(capsys, ["train", "run.yml", "training.seed=5000000000"], "training.seed")


def test_a_reader_that_has_gone_does_not_stop_a_run(work):
    import subprocess
    import sys

    command = (
        f"{sys.executable} -m castalia train run.yml training.steps=30 logging.interval=1 --no-report 2>&1 | head -n 3"
    )
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=120)
    assert (work / "run" / "checkpoints" / "step-00000030").is_dir()
