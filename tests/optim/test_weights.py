"""The stores: arena and plain agree, the norm is exact, gradients accumulate in fp32."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from castalia.config import LossConfig, ModelConfig, OptimizerConfig
from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.model import build_model, linear_cross_entropy
from castalia.model.loss import loss_sums
from castalia.optim import make_store
from castalia.optim.weights import Sink, l2_norm
from castalia.train.engine import LocalEngine

CFG = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, max_position_embeddings=16)


def _train(arena: bool, precision: str, *, tied: bool = False, steps: int = 5, micro: int = 2, clip: float = 0.5):
    cfg = CFG.model_copy(update={"tie_embeddings": tied})
    model = build_model(cfg, seed=3)
    store = make_store(model, OptimizerConfig(lr=1e-2), precision, arena)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for _ in range(micro):
            tokens = torch.randint(0, 64, (2, 17), generator=generator)
            weights = store.working()
            hidden = functional_call(model, weights, (tokens[:, :-1],))
            loss, _ = linear_cross_entropy(hidden, weights[model.head_name], tokens[:, 1:], scale=1 / 64)
            loss.backward()
            store.collect()
        norm = store.gradient_norm()
        store.step(1e-2, divisor=(norm + 1e-6) / clip if norm > clip else None)
    return model, store


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_arena_and_plain_agree(precision, tied):
    arena, arena_store = _train(True, precision, tied=tied)
    plain, plain_store = _train(False, precision, tied=tied)
    # The two differ by the order of sums; a key's bias has no true gradient (softmax does not see it), so
    # Adam divides pure rounding noise there, which sets the tolerance of fp32.
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    theirs = plain_store.tensors()
    assert set(arena_store.tensors()) == set(theirs)
    for name, a in arena_store.tensors().items():
        assert (a - theirs[name]).norm() <= tolerance * theirs[name].norm() + 1e-9, name


def test_arena_parameters_are_views_of_the_flat_masters():
    model, store = _train(True, "bf16", steps=1)
    before = store.working()["layers.0.mlp.up.weight"].clone()
    with torch.no_grad():
        store.tensors()["model.layers.0.mlp.up.weight"].fill_(0.25)
    assert (model.layers[0].mlp.up.weight == 0.25).all()
    assert torch.equal(store.working()["layers.0.mlp.up.weight"], before)  # a copy, until it is refreshed
    store.refresh()
    assert (store.working()["layers.0.mlp.up.weight"] == 0.25).all()


def test_bf16_copies_follow_the_masters():
    model, store = _train(True, "bf16")
    for name, working in store.working().items():
        master = dict(model.named_parameters())[name]
        assert torch.equal(working.float(), master.to(working.dtype).float()), name


def test_micro_batches_add_up_in_fp32():
    """Many small bf16 gradients must not be lost against a large sum."""
    model = build_model(CFG, seed=0)
    store = make_store(model, OptimizerConfig(), "bf16", arena=True)
    for value in [1.0] + [2.0**-9] * 64:
        for tensor in store.working().values():
            tensor.grad = torch.full_like(tensor, value)
        store.collect()
    for name, gradient in store.gradients().items():
        assert torch.equal(gradient, torch.full_like(gradient, 1.0 + 64 * 2.0**-9)), name


def test_missing_gradient_is_an_error():
    store = make_store(build_model(CFG, seed=0), OptimizerConfig(), "fp32", arena=True)
    with pytest.raises(RuntimeError, match="no gradient reached embedding.weight"):
        store.collect()


def test_norm_is_exact_for_long_vectors():
    x = torch.full((3_000_001,), 0.1)
    y = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    exact = (x.double().square().sum() + y.double().square().sum()).sqrt().item()
    assert l2_norm([x, y]).item() == pytest.approx(exact, rel=5e-7)


def test_norms_and_biases_do_not_decay():
    model = build_model(CFG, seed=0)
    store = make_store(model, OptimizerConfig(weight_decay=0.5), "fp32", arena=True)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    for tensor in store.working().values():
        tensor.grad = torch.zeros_like(tensor)
    store.collect()
    store.step(0.1)
    for name, parameter in model.named_parameters():
        expected = 1.0 if parameter.ndim == 1 else 1.0 - 0.1 * 0.5
        assert torch.allclose(parameter, torch.full_like(parameter, expected)), name


def test_an_optimizer_of_the_users_own_is_named_by_module(tmp_path, monkeypatch):
    (tmp_path / "my_optimizers.py").write_text(
        "import torch\nfrom castalia.optim import OptimizerKind\n"
        "plain = OptimizerKind(lambda groups, cfg: torch.optim.SGD(groups, lr=cfg.lr), moments=())\n"
        "wrong = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build_model(CFG, seed=0)
    store = make_store(model, OptimizerConfig(type="my_optimizers:plain", weight_decay=0.0), "fp32", arena=False)
    before = model.head.weight.clone()
    hidden = functional_call(model, store.working(), (torch.zeros(1, 4, dtype=torch.long),))
    linear_cross_entropy(hidden, model.head.weight, torch.ones(1, 4, dtype=torch.long))[0].backward()
    gradient = model.head.weight.grad.clone()
    store.step(0.1)
    torch.testing.assert_close(model.head.weight, before - 0.1 * gradient)
    for name, word in (("my_optimizers:wrong", "OptimizerKind"), ("nowhere:x", "imported"), ("adamx", "adamw")):
        with pytest.raises(UserError, match=word):
            make_store(model, OptimizerConfig(type=name), "fp32", arena=False)


def _steps(engine_changes: dict[str, object], vocab: int = 64, steps: int = 3):
    """Gradients of three steps of two micro-batches through the engine, which takes the short ways where it can."""
    cfg = CFG.model_copy(update={"vocab_size": vocab})
    model = build_model(cfg, seed=3)
    store = make_store(model, OptimizerConfig(lr=1e-2), "fp32", arena=True)
    engine = LocalEngine(model, store, LossConfig())
    for name, value in engine_changes.items():
        setattr(engine, name, value)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(steps):
        batches = []
        for _ in range(2):
            ids = torch.randint(0, vocab // (step + 1), (2, 9), generator=generator)
            batches.append(Batch(ids[:, :-1], ids[:, 1:].clone(), torch.arange(8).expand(2, -1)))
        if step == 1:  # a step that is thrown away leaves nothing behind
            engine.forward_backward(batches, 32)
            store.discard()
        engine.forward_backward(batches, 32)
        # Copies of the views: asking for `gradients` would let the store forget which rows are in use.
        found.append({n: s.gradient_views[i].clone() for s in store._segments for i, n in enumerate(s.names)})
        store.step(1e-2)
    return found


def test_the_short_ways_of_gradients_give_the_same():
    """Rows of the embedding alone, and the output matrix's gradient summed in place, beside plain autograd."""
    short = _steps({})
    plain = _steps({"_rows": False, "loss_sums": lambda *args, **more: loss_sums(*args, **more)})
    for ours, theirs in zip(short, plain, strict=True):
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], atol=1e-7, rtol=1e-5, msg=name)


def test_a_summed_gradient_cannot_be_scaled_afterwards():
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(16, 8, requires_grad=True)
    sums = loss_sums(hidden, weight, torch.arange(4), sink=Sink(torch.zeros(16, 8)))
    with pytest.raises(RuntimeError, match="summed already"):
        (2 * sums.scaled).backward()
