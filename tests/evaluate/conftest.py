"""A tiny random model, as ours and as transformers' own, with a tokenizer that knows bytes."""

from __future__ import annotations

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
