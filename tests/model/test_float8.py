"""Linear maps in float8: forward and backward within the formats' rounding, odd sizes, and learning."""

from __future__ import annotations

import pytest
import torch

from castalia.config import ModelConfig
from castalia.model import Transformer, linear_cross_entropy
from castalia.model import float8 as f8
from castalia.model.layers import Linear

# Half a unit in the last place: e4m3 has 3 bits of mantissa, e5m2 has 2.
E4M3, E5M2 = 2.0**-4, 2.0**-3


def test_each_tensor_fills_its_format():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 1e-6
    for dtype, error in ((f8.FORWARD, E4M3), (f8.BACKWARD, E5M2)):
        y, scale = f8.rounded(x, dtype)
        assert y.float().abs().max() == torch.finfo(dtype).max
        back = y.float() * scale
        assert ((back - x).abs() <= error * x.abs() + 1e-3 * x.abs().max()).all()
    zero, scale = f8.rounded(torch.zeros(3), f8.FORWARD)
    assert torch.equal(zero.float() * scale, torch.zeros(3))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(bad):
    x = torch.ones(4, 16)
    x[1, 2] = bad
    assert not f8.float8_product(x.bfloat16(), torch.ones(16, 16).bfloat16()).isfinite().all()


@pytest.mark.parametrize(("rows", "inner", "outer"), [(32, 64, 48), (7, 20, 5), (16, 16, 17)])
def test_a_linear_map_within_rounding(rows, inner, outer):
    """Of operands that are rounded first the products are exact, but for the sum's dtype."""
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*s, generator=g) for s in ((rows, inner), (outer, inner), (rows, outer)))
    linear = Linear(inner, outer)
    linear.product = f8.float8_product
    with torch.no_grad():
        linear.weight.copy_(w)
    mine = x.clone().requires_grad_()
    y = linear(mine.view(1, rows, inner))
    y.backward(dy.view(1, rows, outer))
    formats = ((x, f8.FORWARD), (w, f8.FORWARD), (dy, f8.BACKWARD))
    x8, w8, dy8 = (t.float() * scale for t, scale in (f8.rounded(t, dtype) for t, dtype in formats))
    bias = linear.bias.detach()
    for found, rounded, exact in (
        (y.detach()[0] - bias, x8 @ w8.T, x @ w.T),
        (mine.grad, dy8 @ w8, dy @ w),
        (linear.weight.grad, dy8.T @ x8, dy.T @ x),
    ):
        assert (found - rounded).norm() < 1e-6 * rounded.norm()
        assert 1e-3 < (found - exact).norm() / exact.norm() < 2 * E5M2
    assert torch.allclose(linear.bias.grad, dy.sum(0), rtol=1e-6)


def test_only_linear_maps_are_changed():
    cfg = ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=64)
    model = Transformer(cfg)
    f8.use_float8(model)
    changed = [n for n, m in model.named_modules() if getattr(m, "product", None) is not None]
    assert changed == [f"layers.0.{n}" for n in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")]


def test_this_device_can_or_says_why(monkeypatch):
    assert f8.missing_float8(torch.device("cpu")) is None

    def refuse(*_, **__):
        raise RuntimeError("torch._scaled_mm is only supported on newer devices\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert f8.missing_float8(torch.device("cpu")) == "torch._scaled_mm is only supported on newer devices"


def test_a_tiny_model_learns_to_copy():
    """The second half of each sequence repeats the first."""
    torch.manual_seed(0)
    cfg = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=16, max_position_embeddings=16)
    model = Transformer(cfg)
    f8.use_float8(model)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        first = torch.randint(0, 16, (32, 8))
        both = torch.cat([first, first], 1)
        labels = both[:, 1:].clone()
        labels[:, :7] = -100
        loss, nll = linear_cross_entropy(model(both[:, :-1]), model.head_weight, labels, scale=1 / (32 * 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert nll.item() / (32 * 8) < 0.5  # of 2.8 for who guesses
