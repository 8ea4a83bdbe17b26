"""Masters and optimizer on the host: the same bits, in the places that the setting names."""

import pytest
import torch
from torch.func import functional_call

from castalia.config import ModelConfig, OptimizerConfig
from castalia.model import build_model, linear_cross_entropy
from castalia.optim import make_store
from castalia.optim.offload import HostStore

CFG = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, max_position_embeddings=16)


def trained(make, steps=4):
    """Store after some clipped steps, with one thrown away on the way."""
    model = build_model(CFG, seed=3)
    store = make(model)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for _ in range(2):
            tokens = torch.randint(0, 64, (2, 17), generator=generator)
            weights = store.working()
            hidden = functional_call(model, weights, (tokens[:, :-1],))
            linear_cross_entropy(hidden, weights[model.head_name], tokens[:, 1:], scale=1 / 64)[0].backward()
            store.collect()
        if step == 1:
            store.discard()
        else:
            store.step(1e-2, store.gradient_norm() / 0.5)
    with store.averaged():
        averages = {n: w.detach().clone() for n, w in store.working().items()}
    return model, store, averages


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw_8bit", "schedule_free"])
def test_the_host_computes_the_same_bits(kind, precision):
    cfg = OptimizerConfig(type=kind, lr=1e-2, average=None if kind == "schedule_free" else 0.9)
    low = torch.bfloat16 if precision == "bf16" else None
    _, plain, expected = trained(lambda model: make_store(model, cfg, precision, arena=False))
    model, hosted, averages = trained(lambda model: HostStore(model, cfg, low))
    ours, theirs = hosted.tensors(), plain.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert all(torch.equal(averages[n], expected[n]) for n in expected)
    for name, parameter in model.named_parameters():  # no longer the masters, but equal to them
        assert parameter.data_ptr() != ours[f"model.{name}"].data_ptr()
        assert torch.equal(parameter, ours[f"model.{name}"])


def test_what_is_written_from_outside_reaches_the_model():
    model, store, _ = trained(lambda model: HostStore(model, OptimizerConfig(), None), steps=1)
    store.tensors()["model.layers.0.mlp.up.weight"].fill_(0.25)
    assert not (model.layers[0].mlp.up.weight == 0.25).any()
    store.refresh()
    assert (model.layers[0].mlp.up.weight == 0.25).all()
