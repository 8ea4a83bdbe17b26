"""The verb and GPT-NeoX's settings: prompts from files, log-probabilities on disk, rounds in the terminal."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.generate.test_load import save

from castalia.checkpoint import save_checkpoint
from castalia.cli import main
from castalia.config import Config
from castalia.config.load import read_gptneox
from castalia.data.store import StoreWriter, TokenStore
from castalia.data.tokenizer import ByteTokenizer, load_tokenizer
from castalia.generate.engine import generate
from castalia.model import Transformer
from castalia.tools.export_gptneox import export_gptneox
from castalia.tools.generation import generate_as_gptneox


@pytest.fixture
def run(tmp_path: Path, make_model: Callable[..., Transformer]) -> str:
    save(tmp_path / "run", make_model(), 5, ByteTokenizer())
    return str(tmp_path / "run")


def test_a_file_of_prompts_becomes_lines_of_json(run: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n\ntwo\nthree and more\n")
    out = tmp_path / "out.jsonl"
    flags = ["--input", str(tmp_path / "in.txt"), "--output", str(out), "--max-tokens", "6", "--num-samples", "2"]
    texts = []
    for size, precision in ((1, "fp32"), (16, "fp32"), (16, "int8")):
        assert main(["generate", run, *flags, "--batch-size", str(size), "--precision", precision]) == 0
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert [r["prompt"] for r in records] == ["one", "one", "two", "two", "three and more", "three and more"]
        assert all(len(r["tokens"]) == len(r["logprobs"]) <= 6 for r in records)
        texts.append([r["tokens"] for r in records])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_rounds_in_the_terminal(run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n" + "x" * 60 + "\ntwo\n"))
    assert main(["generate", run, "--interactive", "--temperature", "0"]) == 0
    said = capsys.readouterr()
    assert said.out.count("prompt> ") == 4 and "prompt> two" in said.out
    assert "60 tokens" in said.err


def test_what_cannot_be_together_is_refused(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, word in (
        (["--prompt", "a", "--interactive"], "one of them"),
        (["--interactive", "--procs", "2"], "leave out --procs"),
        (["--logprobs", "x"], "--output"),
        (["parallel.zero=1"], "parallel.tensor"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--interactive", "--json"], "--json is of no use"),
        (["--procs", "2"], "parallel.tensor=2"),
        (["--beams", "3", "--temperature", "1"], "--temperature is for sampling"),
        (["--beams", "3", "--num-samples", "4"], "no more than that"),
        (["--length-penalty", "2"], "with --beams alone"),
        (["--logprobs", "x", "--output", "y", "--precision", "int8"], "whole models"),
    ):
        assert main(["generate", run, *flags]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("padded", [False, True])
def test_log_probabilities_of_a_data_set(
    run: str, tmp_path: Path, make_model: Callable[..., Transformer], padded: bool
) -> None:
    documents = [list(b"hello there"), [65], list(b"x" * 70)]
    with StoreWriter(tmp_path / "tokens", np.uint16) as writer:
        for ids in documents:
            writer.add_document(ids)
        writer.finish()
    prefix = str(tmp_path / "tokens")
    if padded:
        (tmp_path / "a.yml").write_text(
            json.dumps({"text_gen_type": "precompute", "train_data_paths": [prefix], "seq_length": 20})
        )
        given = read_gptneox([str(tmp_path / "a.yml")], [])
        assert len(list(generate_as_gptneox(run, given))) == 1
        target, length = f"{prefix}_run", 20
    else:
        target, length = str(tmp_path / "scores"), 48
        assert main(["generate", run, "--logprobs", prefix, "--output", target]) == 0
    store = TokenStore(target)
    assert [len(store.get(i)) for i in range(3)] == ([20, 20, 20] if padded else [10, 0, 48])
    model = make_model()
    for i, ids in enumerate(documents):
        ids = (ids + [0] * (length + 1))[: length + 1] if padded else ids[: length + 1]
        if len(ids) > 1:
            tokens = torch.tensor([ids])
            expected = model.logits(model(tokens[:, :-1])).log_softmax(-1).gather(-1, tokens[:, 1:, None]).flatten()
            assert torch.allclose(torch.from_numpy(np.array(store.get(i))), expected, atol=1e-4)


def test_gptneox_returns_logits_when_asked(run: str, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(
        json.dumps({"text_gen_type": "unconditional", "num_samples": 2, "maximum_tokens": 4, "return_logits": True})
    )
    records = [json.loads(line) for line in generate_as_gptneox(run, read_gptneox([str(tmp_path / "a.yml")], []))]
    assert len(records) == 2
    for record in records:
        assert list(record) == ["context", "text", "length", "finished", "message", "duration_seconds", "logits"]
        assert len(record["logits"]) == record["length"] + record["finished"] and len(record["logits"][0]) == 384


def test_beams_are_the_best_of_each_prompt(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--beams", "3", "--num-samples", "2", "--prompt", "one", "--prompt", "two more", "--max-tokens", "6"]
    assert main(["generate", run, *flags, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in records] == ["one", "one", "two more", "two more"]
    assert records[0]["score"] > records[1]["score"]
    assert records[0]["score"] == pytest.approx(sum(records[0]["logprobs"]) / len(records[0]["tokens"]))
    assert main(["generate", run, *flags]) == 0
    assert capsys.readouterr().out.count("two more") == 2


def test_gptneox_prompts_share_batches_and_end_with_the_context(run: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n" + "x" * 45 + "\none\n")
    settings = {"sample_input_file": str(tmp_path / "in.txt"), "maximum_tokens": 9, "temperature": 1.0}
    (tmp_path / "a.yml").write_text(json.dumps(settings))
    assert len(list(generate_as_gptneox(run, read_gptneox([str(tmp_path / "a.yml")], [])))) == 1
    records = [json.loads(line) for line in (tmp_path / "in.txt.output.jsonl").read_text().splitlines()]
    assert [r["context"] for r in records] == ["one", "x" * 45, "one"]
    assert [r["length"] <= most for r, most in zip(records, (9, 3, 9), strict=True)] == [True] * 3
    assert records[0]["text"] != records[2]["text"]


def test_a_gptneox_checkpoint_is_read_as_it_is(
    make_model: Callable[..., Transformer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, theirs = make_model(vocab_size=512), tmp_path / "theirs"
    state = {"step": 5, "config": Config(name="tiny", model=model.cfg, data={"seq_length": 48}).model_dump(mode="json")}
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    export_gptneox(save_checkpoint(tmp_path / "ours", 5, tensors, state), theirs, tensor=2)
    (settings,) = theirs.glob("global_step5/configs/*.yml")
    more = "checkpoint_factor: 10\ntrain_iters: 10\ntrain_micro_batch_size_per_gpu: 1\n"
    settings.write_text(settings.read_text().replace("HFTokenizer", "CharLevelTokenizer") + more)
    flags = ["--prompt", "abc", "--max-tokens", "6", "--temperature", "0", "--no-stop", "--json"]
    assert main(["generate", str(theirs), *flags]) == 0
    expected = generate(model, load_tokenizer("char"), "abc", 6, 0, stop_at_eod=False)[0].tokens
    assert json.loads(capsys.readouterr().out)["tokens"] == expected
    (tmp_path / "text.txt").write_text("some text")
    assert main(["evaluate", str(theirs), "--text", str(tmp_path / "text.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 1
    assert main(["generate", str(theirs), "--step", "5", *flags]) == 2
    assert main(["generate", str(theirs), *flags, "parallel.tensor=2"]) == 2
    assert "castalia import" in capsys.readouterr().err
