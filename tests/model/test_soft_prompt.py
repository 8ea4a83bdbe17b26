"""Soft prompts: what they compute, with a cache too, and that they alone are trained."""

from __future__ import annotations

import pytest
import torch

from castalia.config import LossConfig, ModelConfig, OptimizerConfig
from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.generate.engine import make_cache
from castalia.model import Transformer, build_model
from castalia.model.soft_prompt import prompt_from_tokens
from castalia.optim import make_store
from castalia.train.engine import LocalEngine

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 32}
P = 5


def config(**changes):
    return ModelConfig(**(SHAPE | {"soft_prompt_tokens": P} | changes))


def random_model(cfg):
    model = Transformer(cfg).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    return model


def tokens(rows=2, length=12):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("position", ["rotary", "rpe", "alibi", "none"])
@torch.no_grad()
def test_a_prompt_of_embeddings_is_the_text_in_front(position):
    """Where the vectors are embeddings of tokens, the states are those of a model that reads the tokens."""
    model = random_model(config(position=position))
    plain = Transformer(config(position=position, soft_prompt_tokens=0)).eval()
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if n != "soft_prompt.weight"})
    text = [9, 3, 60]
    prompt_from_tokens(model, text)  # tiled: 9 3 60 9 3
    front = torch.tensor([9, 3, 60, 9, 3]).expand(2, -1)
    expected = plain(torch.cat([front, tokens()], 1))[:, P:]
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-4, atol=1e-4)
    shifted = 2 * torch.arange(12)
    positions = torch.cat([torch.arange(P), shifted + P])
    expected = plain(torch.cat([front, tokens()], 1), positions)[:, P:]
    torch.testing.assert_close(model(tokens(), shifted), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal", "rpe", "alibi", "none"])
@torch.no_grad()
def test_cached_equals_uncached(position):
    model = random_model(config(position=position))
    whole, cache, parts = model(tokens()), make_cache(model, 12), []
    for piece in tokens().split([4, 1, 1, 6], 1):
        parts.append(model(piece, cache=cache))
        cache.advance(piece.shape[1])
    assert cache.length == cache.max_length == P + 12
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_learned_positions_are_those_of_the_tokens_alone():
    model = random_model(config(position="learned"))
    model(tokens(length=32))  # the whole table; the prompt takes none of it
    with pytest.raises(UserError, match="33 tokens"):
        model(tokens(length=33))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_prompt_alone_is_trained(precision, arena, tied):
    model = build_model(config(tie_embeddings=tied, init_method="normal", init_std=0.3), 0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["soft_prompt.weight"]
    store = make_store(model, OptimizerConfig(lr=0.05, weight_decay=0.0), precision, arena)
    engine = LocalEngine(model, store, LossConfig())
    assert {n for n in store.tensors() if n.startswith("optimizer.")} == {
        "optimizer.soft_prompt.weight.exp_avg",
        "optimizer.soft_prompt.weight.exp_avg_sq",
    }
    assert {n.removeprefix("model.") for n in store.tensors() if n.startswith("model.")} == set(before)
    ids = torch.full((4, 9), 7)  # one answer, whatever came before: a prompt can say so
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.arange(8).repeat(4, 1))
    losses = []
    for _ in range(30):
        losses.append(engine.forward_backward([batch], batch.num_tokens).loss)
        assert store.gradient_norm() > 0
        store.step(0.05)
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name != "soft_prompt.weight"), name


def test_frozen_copies_follow_what_is_loaded():
    model = build_model(config(), 0)
    store = make_store(model, OptimizerConfig(), "bf16", arena=True)
    with torch.no_grad():
        store.tensors()["model.layers.0.mlp.up.weight"].fill_(0.25)
    store.refresh()
    working = store.working()["layers.0.mlp.up.weight"]
    assert working.dtype == torch.bfloat16 and (working == 0.25).all() and not working.requires_grad


def test_messages():
    with pytest.raises(UserError, match="soft_prompt_tokens is 0"):
        prompt_from_tokens(Transformer(config(soft_prompt_tokens=0)), [1])
    with pytest.raises(UserError, match="no tokens"):
        prompt_from_tokens(Transformer(config()), [])
    model = build_model(config(), 0)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        make_store(model, OptimizerConfig(), "fp32", arena=False)
