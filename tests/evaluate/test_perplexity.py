"""Scoring a data set: every token once, and bits per byte only where bytes are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.config.schema import ModelConfig
from castalia.data.store import StoreWriter, TokenStore
from castalia.data.tokenizer import ByteTokenizer
from castalia.evaluate.perplexity import score_store
from castalia.model.transformer import Transformer


class WithoutBytes(ByteTokenizer):
    """As a WordPiece tokenizer: it cannot say what its ids weigh."""

    def token_bytes(self) -> np.ndarray | None:
        return None


@pytest.fixture
def model() -> Transformer:
    """A model that gives all 257 ids the same probability."""
    made = Transformer(ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=257))
    with torch.no_grad():
        made.head_weight.zero_()
    return made


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    with StoreWriter(tmp_path / "ds", "u2") as writer:
        writer.add_documents([[*text.encode(), 256] for text in ("one", "two words", "äöü")])
        writer.finish()
    return TokenStore(tmp_path / "ds")


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_token_counts_once(model: Transformer, store: TokenStore, stride: int) -> None:
    score = score_store(model, ByteTokenizer(), store, seq_length=8, stride=stride, batch_size=2)
    assert (score.tokens, score.bytes) == (21, 18)  # ends of documents cost nats and stand for no byte
    assert score.loss == pytest.approx(math.log(257), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(21 * math.log2(257) / 18, rel=1e-5)


def test_no_bits_per_byte_where_bytes_are_unknown(model: Transformer, store: TokenStore) -> None:
    score = score_store(model, WithoutBytes(), store, seq_length=8)
    assert (score.tokens, score.bytes, score.bits_per_byte) == (21, None, None)
    assert score.perplexity == pytest.approx(257, rel=1e-4)
