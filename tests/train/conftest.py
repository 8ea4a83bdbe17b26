"""A tiny data set of bytes and a tiny run over it."""

from __future__ import annotations

import random

import pytest

from castalia.config import Config
from castalia.data.prepare import prepare
from castalia.data.tokenizer import load_tokenizer

WORDS = "the cat sat on a mat and saw that it was not a hat but an old rat in the hall".split()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Prefix of a byte-level data set of 60 short documents."""
    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(60)))
    prepare([folder], folder / "tokens", load_tokenizer("byte"))
    return folder / "tokens"


@pytest.fixture
def tiny_values(tiny_data, tmp_path):
    """Values of a configuration that trains in a second."""
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "data": {"path": str(tiny_data), "split": "80,20,0", "seq_length": 32},
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "rotary_fraction": 0.5},
        "training": {"steps": 12, "batch_size": 8, "micro_batch_size": 4},
        "optimizer": {"lr": 1e-2},
        "evaluation": {"interval": 6, "batches": 2},
        "checkpoint": {"interval": 4},
        "logging": {"interval": 1},
        "performance": {"threads": 1, "peak_flops": 1e11},
    }


@pytest.fixture
def tiny_config(tiny_values):
    return Config.model_validate(tiny_values)
