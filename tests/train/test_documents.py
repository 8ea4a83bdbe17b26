"""A step over packed documents is a step over each of them alone, for every kind of layer, on every path."""

from __future__ import annotations

import pytest
import torch

from castalia.config import LossConfig, ModelConfig, OptimizerConfig
from castalia.config.attention import KINDS
from castalia.data.loader import Batch
from castalia.model import build_model
from castalia.optim import make_store
from castalia.train.engine import LocalEngine

LENGTHS = [5, 20, 1, 14]


def engine_for(kind, precision="fp32"):
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "attention_block": 4}
    cfg = ModelConfig(**shape, attention=kind, position="learned", max_position_embeddings=40, attention_window=6)
    model = build_model(cfg, 0)
    store = make_store(model, OptimizerConfig(), precision, arena=True)
    return LocalEngine(model, store, LossConfig()), store


def batch(ids, lengths, apart=True):
    """One row of documents; the last label of each is left out, as it is the next one's first token."""
    labels = torch.cat([ids[1:], ids[:1]])
    positions = torch.cat([torch.arange(n) for n in lengths])
    numbers = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32)
    labels[torch.tensor(lengths).cumsum(0) - 1] = -100
    return Batch(ids[None], labels[None], positions[None], numbers[None] if apart else None)


def gradients(kind, batches, precision="fp32"):
    engine, store = engine_for(kind, precision)
    loss = engine.forward_backward(batches, sum(b.num_tokens for b in batches)).loss
    return loss, {n: g.clone() for n, g in store.gradients().items()}


@pytest.mark.parametrize("tiles", [False, True], ids=["dense", "tiles"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_or_one_by_one(kind, tiles, monkeypatch):
    if tiles:
        monkeypatch.setattr("castalia.model.attention_mask.DENSE_LENGTH", 0)
    ids = torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(0))
    loss, packed = gradients(kind, [batch(ids, LENGTHS)])
    one_by_one = [batch(part, [len(part)]) for part in ids.split(LENGTHS)]
    other, alone = gradients(kind, one_by_one)
    assert loss == pytest.approx(other, rel=1e-5)
    for name, gradient in alone.items():
        assert (packed[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-7, name
    mixed, _ = gradients(kind, [batch(ids, LENGTHS, apart=False)])
    assert abs(mixed - loss) > 1e-4


def test_bf16_copies(monkeypatch):
    monkeypatch.setattr("castalia.model.attention_mask.DENSE_LENGTH", 0)
    ids = torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(0))
    for kind in ("window", "bigbird", "amlp"):
        loss, exact = gradients(kind, [batch(ids, LENGTHS)])
        low, rounded = gradients(kind, [batch(ids, LENGTHS)], "bf16")
        assert low == pytest.approx(loss, rel=1e-2)
        for name, gradient in exact.items():
            assert (rounded[name] - gradient).norm() < 0.1 * gradient.norm() + 1e-4, (kind, name)


def test_compiling_leaves_tiles_as_they_are(monkeypatch):
    """Tiles break the graph; what is around them is compiled, and the sums are the same."""
    monkeypatch.setattr("castalia.model.attention_mask.DENSE_LENGTH", 0)
    engine, _ = engine_for("window")
    ids = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    documents = batch(ids[0], LENGTHS).doc_ids
    compiled = torch.compile(engine.model, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(ids, doc_ids=documents), engine.model(ids, doc_ids=documents))
