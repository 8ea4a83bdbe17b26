"""A small GPT-NeoX file, and what becomes of it with some values more."""

import json
from typing import Any

import pytest

from castalia.config import Config, load

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "train_iters": 100,
    "train_micro_batch_size_per_gpu": 2,
    "hidden_dropout": 0,
    "attention_dropout": 0,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
}


@pytest.fixture
def small() -> dict[str, Any]:
    """The values of the file."""
    return dict(SMALL)


@pytest.fixture
def translated(tmp_path):
    """Loads a small GPT-NeoX file with some values more; None takes a key out."""

    def translated(*overrides: str, **more: Any) -> Config:
        values = {k: v for k, v in (SMALL | more).items() if v is not None}
        (tmp_path / "small.yml").write_text(json.dumps(values, indent=1))
        return load([tmp_path / "small.yml"], overrides)

    return translated
