"""Recomputed layers: the same gradients to the last bit, a second pass through them, and less kept."""

import pytest
import torch
import torch.utils._python_dispatch
from torch.func import functional_call

from castalia.config import ModelConfig, OptimizerConfig
from castalia.model.dropout import DropoutKey
from castalia.model.loss import linear_cross_entropy
from castalia.model.recompute import Recompute, run_layer
from castalia.model.transformer import build_model
from castalia.optim import make_store

CFG = ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=50, hidden_dropout=0.1, attention_dropout=0.1
)


def gradients(runner, precision="fp32", dropout=True):
    """Gradients of one batch, how often layers were called, and how many elements autograd kept outside of them."""
    model = build_model(CFG, 1)
    model.runner = runner
    store = make_store(model, OptimizerConfig(), precision, arena=True)
    calls, kept = [], []
    for block in model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.arange(64).view(2, 32) % 50
    key = DropoutKey(1, 2, torch.arange(2)) if dropout else None
    weights = store.working()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        hidden = functional_call(model, weights, (tokens, None, None, key))
        linear_cross_entropy(hidden, weights["head.weight"], tokens)[0].backward()
    store.collect()
    return {n: g.clone() for n, g in store.gradients().items()}, len(calls), sum(kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("selective", [False, True])
def test_gradients_are_equal_to_the_bit(precision, selective):
    expected, once, kept = gradients(run_layer, precision)
    found, twice, less = gradients(Recompute(selective), precision)
    assert (once, twice) == (4, 8) and less < kept / 5
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)


@pytest.mark.parametrize("selective", [False, True])
def test_inputs_that_wait_on_the_host_come_back_to_the_bit(selective, monkeypatch):
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (moved.append(self.shape), cpu(self))[1])
    expected, found = gradients(run_layer)[0], gradients(Recompute(selective, offload=True))[0]
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    assert moved.count(torch.Size((2, 32, 32))) == 4  # the input of each layer


def test_every_so_manieth_layer_alone():
    assert gradients(Recompute(every=3))[1] == 4 + 2


def test_selective_keeps_matrix_products():
    # Seen by their number: what is kept is not computed again.
    def products(runner):
        count = []
        real = torch.ops.aten.mm.default

        class Counting(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in (real, torch.ops.aten.addmm.default):
                    count.append(1)
                return func(*args, **(kwargs or {}))

        with Counting():
            gradients(runner, dropout=False)
        return len(count)

    plain = products(run_layer)
    assert products(Recompute(selective=True)) == plain < products(Recompute())


def test_without_gradients_nothing_is_recomputed():
    model = build_model(CFG, 1)
    model.runner = Recompute()
    with torch.no_grad():
        assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 32)
