"""Small models and a tokenizer of bytes for the generation tests."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from castalia.config import ModelConfig
from castalia.model import Transformer, build_model


class ByteTokenizer:
    """UTF-8 bytes are their own ids; 256 ends a text."""

    vocab_size = 257
    eod: int | None = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


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
