"""Small models and a tokenizer of its own for each generation test."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from castalia.config import ModelConfig
from castalia.data.tokenizer import ByteTokenizer
from castalia.model import Transformer, build_model


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    def make(**changes: Any) -> Transformer:
        settings = {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": 384,
            "max_position_embeddings": 48,
            "rotary_fraction": 0.5,
        }
        model = build_model(ModelConfig(**(settings | changes)), seed=0)
        with torch.no_grad():  # sharper than an untrained model, so that tokens differ and ties are no concern
            model.head_weight.mul_(20)
        return model

    return make
