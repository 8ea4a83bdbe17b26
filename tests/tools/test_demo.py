"""The demo on a small corpus of the user's own: every file it promises, figures that are real."""

from __future__ import annotations

import json

import pytest

from castalia.checkpoint import RunLock
from castalia.data.corpora import stdlib_corpus
from castalia.errors import UserError
from castalia.tools.demo import demo_minutes, run_demo

SMALL = ["model.num_layers=1", "model.hidden_size=64", "model.num_attention_heads=2", "data.seq_length=64"]
SMALL += ["training.batch_size=4", "performance.threads=1", "evaluation.batches=2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    size = 0
    for number, (_, text) in enumerate(stdlib_corpus()):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
        size += len(text)
        if size > 400_000 and number > 60:
            break
    return folder


def test_own_corpus(corpus, tmp_path):
    lines = []
    result = run_demo(tmp_path, corpus, minutes=0.02, say=lines.append, overrides=SMALL)
    rows = {(row["name"], row["note"]): row["bits_per_byte"] for row in result.comparison["rows"]}
    assert set(rows) >= {("castalia", "trained on the training text"), ("xz -9", "alone"), ("zstd -19", "alone")}
    # Ten steps are enough to beat eight bits per byte, and not enough to beat a compressor.
    assert 1.0 < rows["castalia", "trained on the training text"] < 7.0
    assert rows["xz -9", "given the training text"] < rows["xz -9", "alone"]
    page = result.report.read_text(encoding="utf-8")
    assert "xz -9" in page and "castalia" in page and "http" not in page.replace("http://www.w3.org", "")
    train = (tmp_path / "data" / "demo" / "train.jsonl").read_text().splitlines()
    valid = (tmp_path / "data" / "demo" / "valid.jsonl").read_text().splitlines()
    assert not {json.loads(line)["name"] for line in train} & {json.loads(line)["name"] for line in valid}
    assert any("steps in" in line for line in lines)
    assert "[4/5] training for about 1 s" in lines
    assert any("xz -9 of both" in line for line in lines)
    assert result.comparison["valid_bytes"] == sum(len(json.loads(line)["text"].encode()) for line in valid)


def test_one_file_keeps_its_end_unseen(tmp_path, monkeypatch):
    text = "".join(f"line {i}: the quick brown fox number {i * i} jumps over {i % 97} dogs\n" for i in range(4000))
    source = tmp_path / "book.txt"
    source.write_text(text)
    lines = []
    monkeypatch.setattr("castalia.tools.demo.LEAST_SECONDS", 0.0)  # a machine that has no time for all of it
    result = run_demo(tmp_path, source, minutes=1e-5, say=lines.append, overrides=SMALL)
    seen = result.comparison["valid_bytes"]
    valid = json.loads((tmp_path / "data" / "demo" / "valid.jsonl").read_text())["text"]
    assert text.endswith(valid) and len(valid) == pytest.approx(0.05 * len(text), rel=0.01)
    assert 0 < seen < len(valid) and any(f"the first {seen / 1e6:.2f} MB" in line for line in lines)
    assert result.comparison["rows"][0]["name"] == "castalia"


def test_too_little_text(tmp_path):
    (tmp_path / "note.txt").write_text("not much")
    with pytest.raises(UserError, match=r"note\.txt: holds 8 bytes"):
        run_demo(tmp_path, tmp_path / "note.txt", minutes=0.01, say=lambda _: None)


def test_seconds_from_the_environment(monkeypatch):
    monkeypatch.setenv("CASTALIA_DEMO_SECONDS", "30")
    assert demo_minutes(3.0) == 0.5
    monkeypatch.setenv("CASTALIA_DEMO_SECONDS", "soon")
    with pytest.raises(UserError, match="CASTALIA_DEMO_SECONDS"):
        demo_minutes(3.0)


def test_an_earlier_run_is_set_aside_not_removed(tmp_path):
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog again and again\n" * 3000)
    mine = tmp_path / "runs" / "demo" / "checkpoints" / "mine"
    mine.mkdir(parents=True)
    run_demo(tmp_path, tmp_path / "book.txt", minutes=0.01, say=lambda _: None, overrides=SMALL)
    assert (tmp_path / "runs" / "demo.1" / "checkpoints" / "mine").exists()
    with RunLock(tmp_path / "runs" / "demo"), pytest.raises(UserError, match="is using this run"):
        run_demo(tmp_path, tmp_path / "book.txt", minutes=0.01, say=lambda _: None, overrides=SMALL)


def test_a_prompt_that_does_not_fit_is_refused_before_training(tmp_path):
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog again and again\n" * 3000)
    with pytest.raises(UserError, match="--prompt"):
        run_demo(tmp_path, tmp_path / "book.txt", 0.01, lambda _: None, prompt="fox " * 400, overrides=SMALL)
    assert not (tmp_path / "runs").exists()
