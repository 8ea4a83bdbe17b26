"""Validation at its interval and at the end, the test at the end, and what they measure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from castalia.config import Config
from castalia.data.loader import Batch
from castalia.data.tokenizer import ByteTokenizer
from castalia.errors import UserError
from castalia.train.evaluation import TextCount, samples
from castalia.train.metrics import read_metrics
from castalia.train.run import Run, train


def with_evaluation(values, split="60,30,10", **settings):
    data = values["data"] | {"split": split}
    return Config.model_validate(values | {"data": data, "evaluation": {"batches": 2, **settings}})


def records(run, kind):
    return [r for r in read_metrics(run.directory / "metrics.jsonl") if r["kind"] == kind]


@pytest.mark.parametrize(
    ("settings", "valid", "test"),
    [
        ({"interval": 5}, [5, 10, 12], []),
        ({"interval": 6}, [6, 12], []),  # the last is due and the last: once
        ({"interval": 5, "at_end": False}, [5, 10], []),
        ({"interval": None}, [12], []),
        ({"interval": None, "at_end": False, "test_at_end": True}, [], [12]),
        ({"interval": 6, "test_at_end": True, "continuing": True}, [6, 12], [12]),
    ],
)
def test_when(settings, valid, test, tiny_values):
    config = with_evaluation(tiny_values, **settings)
    run = train(config, quiet=True)
    found = {kind: [r["step"] for r in records(run, kind)] for kind in ("valid", "test")}
    assert found == {"valid": valid, "test": test}
    train(config, quiet=True)  # finished: nothing is evaluated again
    assert {kind: [r["step"] for r in records(run, kind)] for kind in ("valid", "test")} == found


def test_a_test_that_was_missed_is_made_up_for(tiny_values, monkeypatch):
    """The run dies between the last checkpoint and the test."""
    config = with_evaluation(tiny_values, interval=None, test_at_end=True)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", lambda run, split: 1 / 0 if split == "test" else None)
        with pytest.raises(ZeroDivisionError):
            train(config, quiet=True)
    run = train(config, quiet=True)
    assert [r["step"] for r in records(run, "test")] == [12] and "test" in run.last


def test_a_split_without_documents_is_passed_over(tiny_values):
    run = train(with_evaluation(tiny_values, "100,0,0", interval=6, test_at_end=True), quiet=True)
    assert records(run, "valid") == records(run, "test") == []


def test_natively_every_validation_reads_the_same(tiny_values):
    with Run(with_evaluation(tiny_values, interval=3), quiet=True) as run:
        first, second = run.evaluate("valid"), run.evaluate("valid")
        assert first == second and first["tokens"] == 2 * 8 * 32
        run.step = 9
        assert run.evaluate("valid")["loss"] == first["loss"]


@pytest.mark.parametrize(("steps", "end"), [(12, 12), (14, 14)])
def test_continuing_reads_on_without_a_gap(steps, end, tiny_values):
    """GPT-NeoX's way: the n-th validation has the n-th stretch of samples, the one at the end included."""
    values = tiny_values | {"training": tiny_values["training"] | {"steps": steps}}
    read = {}

    class Looking(Run):
        def evaluate(self, split):
            read[self.step] = samples(self, split)
            return super().evaluate(split)

    with Looking(with_evaluation(values, interval=4, continuing=True), quiet=True) as run:
        run.train()
    assert sorted(read) == sorted({4, 8, 12, end})
    assert [read[step].first_sample for step in sorted(read)] == [16 * i for i in range(len(read))]
    assert len(run.data.datasets["valid"]) >= 16 * len(read)
    losses = [r["loss"] for r in records(run, "valid")]
    assert len(set(losses)) == len(losses)


def test_the_test_set_is_always_read_from_its_start(tiny_values):
    with Run(with_evaluation(tiny_values, interval=4, continuing=True, test_at_end=True), quiet=True) as run:
        run.step = 12
        assert samples(run, "test").first_sample == 0
        assert samples(run, "valid").first_sample == 32


def test_bytes_and_characters_of_ascii_are_the_same(tiny_values):
    run = train(with_evaluation(tiny_values, interval=6, characters=True), quiet=True)
    for record in records(run, "valid"):
        # One byte is one character here, so both say the same in other units.
        assert record["char_perplexity"] == pytest.approx(2 ** record["bits_per_byte"], rel=1e-9)
        assert record["char_perplexity"] > record["perplexity"]  # ends of documents cost nats and are no text


def test_characters_are_off_unless_asked_for(tiny_config):
    assert all("char_perplexity" not in r for r in records(train(tiny_config, quiet=True), "valid"))


def test_what_labels_stand_for():
    """`für` and half an `ü`, an end of a document, labels that do not count."""
    tokenizer = ByteTokenizer()
    text = [*"für".encode(), 256, "ü".encode()[0]]
    labels = torch.tensor([[*text, -100, 65], [-100] * len(text) + [256, 66]])
    batch = Batch(tokens=labels, labels=labels, positions=labels)
    count = TextCount(tokenizer.token_bytes(), tokenizer)
    count.add(batch)
    assert count.bytes == 4 + 1 + 1 + 1
    assert count.characters == len("für" + "\ufffd" + "A") + len("B")
    count = TextCount(None, tokenizer)
    count.add(batch)
    assert count.bytes == count.characters == 0
    count = TextCount(np.ones(300, np.int32), None)
    count.add(batch)
    assert count.bytes == 9 and count.characters == 0


def test_characters_need_a_tokenizer(tiny_values, tmp_path):
    """Data of another tool, of which nobody said how it was made."""
    import shutil
    from pathlib import Path

    for suffix in (".bin", ".idx"):
        shutil.copy(Path(f"{tiny_values['data']['path']}{suffix}"), tmp_path / f"bare{suffix}")
    data = tiny_values["data"] | {"path": str(tmp_path / "bare")}
    model = tiny_values["model"] | {"vocab_size": 384}
    values = tiny_values | {"data": data, "model": model}
    with pytest.raises(UserError, match="evaluation.characters: there is no tokenizer.*tokenizer.path"):
        Run(Config.model_validate(values | {"evaluation": {"characters": True}}), quiet=True)
    assert train(Config.model_validate(values), quiet=True).step == 12


def test_a_hopeless_loss_is_no_overflow(tiny_values):
    with Run(with_evaluation(tiny_values, interval=3), quiet=True) as run:
        with torch.no_grad():
            run.store.tensors()["model.head.weight"].mul_(1e4)
        run.store.refresh()
        record = run.evaluate("valid")
    assert record["loss"] > 709 and math.isfinite(record["perplexity"])
