"""Matrix products of 16-bit numbers by fp32 ones: the same numbers, gradients and rounding; the choice is kept."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from castalia.config import ModelConfig, OptimizerConfig
from castalia.model import build_model, kernels
from castalia.model.loss import linear_cross_entropy
from castalia.optim import make_store

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_wide_product_is_the_native_one(dtype, with_bias):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight, grad = draw(2, 5, 24), draw(7, 24), draw(2, 5, 7)
    bias = draw(7) if with_bias else None
    results = []
    for product in (F.linear, kernels.WideProduct(dtype)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, *([] if bias is None else [bias]))]
        y = product(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    step = torch.finfo(dtype).eps  # results are sums in another order, rounded: next to each other at most
    for native, wide in zip(*results, strict=True):
        assert native.dtype == wide.dtype == dtype and native.shape == wide.shape
        assert (native.float() - wide.float()).norm() <= step * native.float().norm()
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (
        torch.equal(results[1][0], exact.to(dtype)) or (results[1][0] - exact).abs().max() <= step * exact.abs().max()
    )


def _gradients(matmul, position="rotary", **changes):
    cfg = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, position=position, **changes
    )  # fmt: skip
    model = build_model(cfg, seed=3)
    kernels.use_matmul(model, matmul)
    store = make_store(model, OptimizerConfig(), "bf16", arena=True)
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))
    weights = store.working()
    hidden = functional_call(model, weights, (tokens[:, :-1],))
    matrix = kernels.head_matrix(model, weights[model.head_name])
    assert matrix.dtype == (torch.float32 if matmul == "fp32" else torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, matrix, tokens[:, 1:], scale=1 / 32)
    loss.backward()
    store.collect()
    return loss.detach(), store.gradients()


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"num_kv_heads": 2}, {"position": "alibi"}])
def test_a_model_has_the_same_gradients_by_either_way(changes):
    native_loss, native = _gradients("native", **changes)
    loss, wide = _gradients("fp32", **changes)
    assert abs(loss - native_loss) < 2e-3
    for name, gradient in wide.items():
        assert (gradient - native[name]).norm() <= 2e-2 * native[name].norm() + 1e-4, name


def test_choice_is_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []

    def fastest(ways):
        measured.append(list(ways))
        return "fp32"

    monkeypatch.setattr(kernels, "_fastest", fastest)
    assert kernels.choose_matmul(CPU, torch.bfloat16) == kernels.choose_matmul(CPU, torch.bfloat16) == "fp32"
    assert measured == [["native", "fp32"]]
    file = tmp_path / "castalia" / "kernels.json"
    assert list(json.loads(file.read_text()).values()) == ["fp32"]
    file.write_text('["not what it should be"]')
    assert kernels.choose_matmul(CPU, torch.bfloat16) == "fp32" and len(measured) == 2


def test_choice_needs_no_cache_and_obeys(monkeypatch, tmp_path):
    (tmp_path / "castalia").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.choose_matmul(CPU, torch.bfloat16) in ("native", "fp32")
    assert kernels.choose_matmul(CPU, torch.bfloat16, "native") == "native"
    assert kernels.choose_matmul(CPU, torch.bfloat16, "fp32") == "fp32"
    assert kernels.choose_matmul(CPU, None, "fp32") == "native"  # nothing has 16 bits
    assert kernels.choose_matmul(torch.device("meta"), torch.bfloat16) == "native"  # not a CPU


def test_fastest_prefers_the_first_where_none_is_clearly_faster():
    clock = {"now": 0.0}

    def taking(seconds):
        def way():
            clock["now"] += seconds

        return way

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.time, "perf_counter", lambda: clock["now"])
        assert kernels._fastest({"a": taking(1.0), "b": taking(0.99)}) == "a"
        assert kernels._fastest({"a": taking(1.0), "b": taking(0.5)}) == "b"
