"""Initial weights: each method's distribution, drawn by name, of the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch

from castalia.config import ModelConfig
from castalia.errors import UserError
from castalia.model import build_model
from castalia.model.initial import INITIALISERS, initial_value, uniform_rows

CFG = ModelConfig(num_layers=8, hidden_size=64, num_attention_heads=4, vocab_size=512, init_std=0.03)
STD = {
    "normal": 0.03,
    "scaled_normal": 0.03 / 4,
    "single_residual_scaled_normal": 0.03 / math.sqrt(8),
    "small_init": math.sqrt(2 / 320),
    "wang_init": 2 / (8 * 8),
    "xavier_normal": math.sqrt(2 / (512 + 256)),
    "xavier_uniform": math.sqrt(2 / (512 + 256)),
    "orthogonal": math.sqrt(2 / 512),  # columns of length sqrt(2) spread over 512 rows
    "scaled_orthogonal": math.sqrt(2 / 8 / 512),
}


def drawn(method, shape=(512, 256), name="layers.0.mlp.up.weight", seed=0):
    out = torch.empty(shape)
    initial_value(name, out, CFG.model_copy(update={"init_method": method, "output_init_method": method}), seed)
    return out


def test_every_method_is_tested():
    assert set(STD) == set(INITIALISERS)


@pytest.mark.parametrize("method", STD)
def test_spread_and_dependence(method):
    values = drawn(method)
    assert values.std().item() == pytest.approx(STD[method], rel=0.02)
    assert abs(values.mean()) < 5 * STD[method] / math.sqrt(values.numel())
    assert torch.equal(values, drawn(method))
    assert not torch.equal(values, drawn(method, seed=1))
    assert not torch.equal(values, drawn(method, name="layers.1.mlp.up.weight"))


def test_uniform_is_bounded_and_flat():
    values = drawn("xavier_uniform")
    bound = math.sqrt(6 / (512 + 256))
    assert values.abs().max() <= bound and values.abs().max() > 0.999 * bound
    assert (values.abs() < bound / 2).float().mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("method", "gain"), [("orthogonal", math.sqrt(2)), ("scaled_orthogonal", 0.5)])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)])
def test_orthogonal(method, gain, shape):
    values = drawn(method, shape).double()
    product = values.T @ values if shape[0] >= shape[1] else values @ values.T
    torch.testing.assert_close(product, gain**2 * torch.eye(min(shape)).double(), rtol=0, atol=1e-6)
    # The signs are fixed by R's diagonal; left as the library gives them, the first column would lean one way.
    corner = torch.stack([drawn(method, (4, 4), seed=s)[0, 0] for s in range(100)])
    assert 30 < (corner > 0).sum() < 70


def test_some_rows_of_a_uniform_matrix_are_drawn_alone():
    whole, part = torch.empty(3000, 700), torch.empty(1000, 700)
    uniform_rows("x.weight", whole, 1, 0.5)
    uniform_rows("x.weight", part, 1, 0.5, first_row=1490)
    assert torch.equal(part, whole[1490:2490])


def test_what_has_an_initial_value_of_its_own():
    cfg = CFG.model_copy(
        update={"position": "rpe", "norm": "scalenorm", "qk_norm": True, "soft_prompt_tokens": 40, "num_layers": 1}
    )
    model = build_model(cfg.model_copy(update={"init_method": "orthogonal", "soft_prompt_range": 0.25}), 0)
    assert model.relative_bias.weight.std().item() == pytest.approx(math.sqrt(2 / (32 + 4)), rel=0.25)
    assert 0.24 < model.soft_prompt.weight.abs().max() <= 0.25
    layer = model.layers[0]
    for ones in (layer.attention_norm.weight, layer.attention.qk_norm.weight, model.final_norm.weight):
        assert (ones == 1).all()


def test_learned_positions_are_drawn_by_init_method():
    cfg = CFG.model_copy(update={"position": "learned", "max_position_embeddings": 400, "init_method": "normal"})
    assert build_model(cfg, 0).position_embedding.weight.std().item() == pytest.approx(0.03, rel=0.05)


def test_unknown_method_is_named():
    with pytest.raises(UserError, match="model.init_method: 'zeros' is not known"):
        drawn("zeros")
