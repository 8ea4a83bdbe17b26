"""Norms against their formulas, element by element; the parameters they have are those of the size table."""

from __future__ import annotations

import pytest
import torch

from castalia.config import ModelConfig
from castalia.errors import UserError
from castalia.model.norms import make_norm, norm_heads
from castalia.model.registry import NORMS

BUILT_IN = ["layernorm", "rmsnorm", "rmsnorm_eps_outside", "scalenorm", "non_parametric_layernorm"]
EPS = 0.03  # large enough that where it stands matters


def formula(name, x, weight, bias):
    """The pages' formulas, one vector at a time."""
    out = torch.empty_like(x)
    for i, v in enumerate(x):
        if "layernorm" in name:
            y = (v - v.mean()) / ((v - v.mean()).square().mean() + EPS).sqrt()
        elif name == "rmsnorm":
            y = v / (v.square().mean() + EPS).sqrt()
        elif name == "rmsnorm_eps_outside":
            y = v / (v.square().sum().sqrt() / len(v) ** 0.5 + EPS)
        else:
            y = v / max(v.square().sum().sqrt().item(), EPS)
        out[i] = y * weight + bias
    return out


def randomised(name, size):
    norm = NORMS[name](size, EPS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return norm, getattr(norm, "weight", 1.0), getattr(norm, "bias", 0.0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_formula(name):
    norm, weight, bias = randomised(name, 24)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e-3], [0.1], [1], [10], [0]])
    torch.testing.assert_close(norm(x), formula(name, x, weight, bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN)
def test_statistics_are_fp32_whatever_comes_in(name):
    norm, _, _ = randomised(name, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert norm(x).dtype == torch.float32
    assert torch.equal(norm(x), norm(x.float()))
    assert norm.bfloat16()(x).dtype == torch.float32
    assert norm.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", BUILT_IN)
def test_heads_are_normed_as_gptneox_norms_the_shape_of_heads_and_dimensions(name):
    """Layer norms over all n d numbers of a token, the others over each head's d; a gain for each of n d."""
    n, d = 3, 8
    norm, weight, bias = randomised(name, n * d)
    x = torch.randn(2, 5, n, d, generator=torch.Generator().manual_seed(1))
    if "layernorm" in name:
        expected = formula(name, x.view(10, n * d), weight, bias).view_as(x)
    else:
        gain = weight if name == "scalenorm" else weight.view(n, d)
        expected = formula(name, x.view(-1, d), 1.0, 0.0).view_as(x) * gain
    torch.testing.assert_close(norm_heads(norm, x), expected, rtol=1e-5, atol=1e-6)
    assert norm_heads(norm, x.bfloat16()).dtype == torch.bfloat16


def test_unknown_norm_is_named():
    with pytest.raises(UserError, match="model.norm: 'batchnorm' is not known"):
        make_norm(ModelConfig(norm="batchnorm"))
