"""Requests of lm-evaluation-harness: encoding, windows, generation without it; its own loop where it is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import pytest
import torch

from castalia.cli import main
from castalia.convert import huggingface_config, to_huggingface
from castalia.errors import UserError
from castalia.evaluate.harness import encode_pair, find_tasks, generate_until, log_likelihoods, metrics_of, rolling

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed: it brings thirty packages, so it is not among those of [dev]",
)


def ids(text):
    return list(text.encode())


def test_white_space_at_the_end_of_a_context_is_the_continuations(subject):
    assert encode_pair(subject, "a b \n", "c") == (ids("a b"), ids(" \nc"))
    assert encode_pair(subject, "a", " b") == (ids("a"), ids(" b"))
    assert encode_pair(subject, "", "bc") == ([256], ids("bc"))
    assert encode_pair(subject, "  ", "c")[0] == [256]


def test_a_bos_is_put_in_front_once(subject):
    with_bos = dataclasses.replace(subject, bos=256, first=256)
    assert encode_pair(with_bos, "a", "b") == ([256, *ids("a")], ids("b"))
    assert encode_pair(with_bos, "", "b") == ([256], ids("b"))


def test_log_likelihoods_are_those_of_transformers(subject):
    transformers = pytest.importorskip("transformers")
    settings = huggingface_config(subject.model.cfg, eod=256)
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(
        None,
        config=transformers.GPTNeoXConfig(**settings),
        state_dict=to_huggingface(subject.model.state_dict(), subject.model.cfg),
    ).eval()
    pairs = [("the cat", " sat"), ("the cat", " ran away"), ("", "x"), ("the cat sat ", "on"), ("q", "r")]
    for batch_size in (1, 8, 32):
        for pair, (logprob, greedy) in zip(pairs, log_likelihoods(subject, pairs, batch_size), strict=True):
            context, continuation = encode_pair(subject, *pair)
            whole = torch.tensor([[*context, *continuation]])
            with torch.no_grad():
                logits = theirs(whole).logits[0, len(context) - 1 : -1, :257]
            targets = torch.tensor(continuation)
            expected = logits.log_softmax(-1)[range(len(targets)), targets].sum().item()
            assert logprob == pytest.approx(expected, abs=1e-4)
            assert greedy == bool((logits.argmax(-1) == targets).all())


def test_long_texts_are_scored_in_windows(subject):
    text = "abcdefgh" * 15  # 120 tokens of a model that sees 48
    (found,) = rolling(subject, [text], 4)
    total, known, done = 0.0, [256, *ids(text)], 0
    while done < 120:
        end = min(done + 48, 120)
        window = torch.tensor([known[max(end - 48, 0) : end + 1]])
        with torch.no_grad():
            logits = subject.model.logits(subject.model(window[:, :-1]))[0, :, :257].log_softmax(-1)
        n = end - done
        total += logits[range(48 - n, 48), window[0, -n:]].sum().item()
        done = end
    assert found == pytest.approx(total, rel=1e-5)


def test_generation_stops_at_the_first_stop_string(subject):
    whole = generate_until(subject, [("the cat", {"max_gen_toks": 12})], 4)[0]
    assert len(whole) >= 4
    stop = whole[2:4]
    cut = whole.split(stop)[0]
    requests = [("the cat", {"max_gen_toks": 12, "until": [stop, "nowhere"]})] * 3
    for batch_size in (1, 8):
        assert generate_until(subject, requests, batch_size) == [cut] * 3
    assert generate_until(subject, [("x" * 500, {"max_gen_toks": 3})], 4) != [""]


@pytest.mark.parametrize(
    ("options", "words"), [({"max_gen_toks": 48}, "leaves no room"), ({"num_beams": 4}, "num_beams of a task")]
)
def test_generation_that_cannot_be_says_so(subject, options, words):
    with pytest.raises(UserError, match=words):
        generate_until(subject, [("a", options)], 1)


@pytest.fixture
def tasks(tmp_path):
    """A task of each kind, with data of their own."""
    rows = [
        {"q": "the cat sat on a", "a": [" mat", " hat", " zebra quiz"], "l": i % 2, "text": "the cat saw a mat " * 5}
        for i in range(4)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "choose": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: a\ndoc_to_target: l\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
        "guess": "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a[0]}}'\n"
        "metric_list: [{metric: acc}, {metric: perplexity}]\n",
        "roll": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
        "write": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a[0]}}'\n"
        "generation_kwargs: {until: [' '], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n",
    }
    for name, body in kinds.items():
        head = f"task: tiny_{name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(head + body)
    return tmp_path


@needs_harness
def test_the_harness_runs_its_tasks(run, tasks, capsys, tmp_path, monkeypatch):
    for name, value in (("HF_HOME", str(tmp_path / "cache")), ("HF_DATASETS_OFFLINE", "1"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    argv = ["evaluate", str(run), "--tasks", "tiny_choose,tiny_guess", "tiny_roll", "tiny_write", "--limit", "3"]
    argv += ["--include-path", str(tasks), "--offline", "--output", str(tmp_path / "r.json"), "--log-samples", "--json"]
    assert main([*argv, "--baseline", str(run)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["results"] == found["results"] and written["n-samples"]["tiny_choose"]["effective"] == 3
    for key in ("configs", "versions", "n-shot", "higher_is_better", "config", "git_hash", "date", "task_hashes"):
        assert key in written, key
    metrics = metrics_of(written)
    assert math.isfinite(metrics["tiny_roll_bits_per_byte"]) and 0 <= metrics["tiny_choose_acc"] <= 1
    assert found["comparison"]["metrics"]["tiny_choose_acc"]["difference"] == 0
    samples = [json.loads(line) for line in (tmp_path / "samples_tiny_choose.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and samples[0]["doc"]["q"] == "the cat sat on a"


@needs_harness
def test_a_task_that_does_not_exist_says_so(tasks):
    with pytest.raises(UserError, match="tiny_chose: there is no such task; did you mean tiny_choose"):
        find_tasks(["tiny_guess", "tiny_chose"], str(tasks), own_only=True)
    assert find_tasks(["tiny_*"], str(tasks)).names == ["tiny_choose", "tiny_guess", "tiny_roll", "tiny_write"]


def test_without_the_harness_one_sentence_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["evaluate", str(run), "--tasks", "piqa"]) == 2
    assert "pip install 'castalia[eval]'" in capsys.readouterr().err
