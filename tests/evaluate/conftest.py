"""A tiny random model, as ours and as transformers' own, with a tokenizer that knows bytes."""

from __future__ import annotations

import random

import pytest
import torch

from castalia.config.schema import ModelConfig
from castalia.data.tokenizer import ByteTokenizer
from castalia.evaluate.subject import Subject
from castalia.model.transformer import Transformer, build_model

LENGTH = 48


@pytest.fixture(scope="session")
def model() -> Transformer:
    """257 ids and 31 of padding, whose logits are as large as any."""
    made = build_model(
        ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=288, max_position_embeddings=LENGTH
        ),
        seed=1,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return made.eval()


@pytest.fixture(scope="session")
def subject(model: Transformer) -> Subject:
    tokenizer = ByteTokenizer()
    assert tokenizer.eod is not None
    return Subject("tiny", model, tokenizer, LENGTH, tokenizer.eod)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of 12 steps over few sentences, with a checkpoint at each fourth."""
    return trained(tmp_path_factory)


@pytest.fixture(scope="session")
def wide_run(tmp_path_factory):
    """A run of two layers, so that both can be shared out."""
    return trained(tmp_path_factory, "model.num_layers=2", "training.steps=2")


def trained(tmp_path_factory, *overrides):
    from castalia.cli import main
    from castalia.data.prepare import prepare

    folder = tmp_path_factory.mktemp("evaluated")
    draw = random.Random(0)
    words = "the cat sat on a mat and saw that it was not a hat".split()
    (folder / "texts").mkdir()
    for i in range(30):
        (folder / "texts" / f"{i:02d}.txt").write_text(" ".join(draw.choice(words) for _ in range(60)))
    prepare([folder / "texts"], folder / "tokens", ByteTokenizer())
    settings = {
        "data.path": folder / "tokens", "data.split": "90,10,0", "data.seq_length": 48, "model.num_layers": 1,
        "model.hidden_size": 32, "model.num_attention_heads": 2, "training.steps": 12, "training.batch_size": 8,
        "checkpoint.interval": 4, "checkpoint.keep_last": "null", "evaluation.interval": "null", "optimizer.lr": 0.01,
        "evaluation.at_end": "false", "performance.peak_flops": "1.0e11", "performance.threads": 1,
        "output": folder / "run",
    }  # fmt: skip
    changed = dict(o.split("=") for o in overrides)
    argv = [f"{key}={value}" for key, value in (settings | changed).items()]
    assert main(["train", *argv, "--quiet", "--no-report"]) == 0
    return folder / "run"
