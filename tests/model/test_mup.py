"""muP's rules: nothing at the base width, the right numbers elsewhere, and every multiplier acts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

from castalia.config import ModelConfig, OptimizerConfig, mup
from castalia.errors import UserError
from castalia.model import build_model, linear_cross_entropy
from castalia.model.transformer import Transformer
from castalia.optim import OptimizerKind, make_store, optimizers

BASE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 16}
FORMS = {
    "plain": {},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "intermediate_size": 96, "num_kv_heads": 2},
    "tied": {"tie_embeddings": True, "position": "learned", "qk_norm": "full", "norm_placement": "post"},
    "rpe": {"position": "rpe", "qk_norm": True, "residual": "parallel", "init_method": "xavier_normal"},
    "experts": {"moe_num_experts": 4, "moe_shared_experts": 1, "moe_bias_rate": 0.1, "qk_norm": "head", "mtp_depth": 1},
    "gmlp": {"attention": ["gmlp", "window"], "attention_window": 4, "position": "none", "head_bias": True},
}
TOKENS = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))


def config(width=32, base=32, **fields):
    values = BASE | {"mup": True, "mup_base_hidden_size": base} | fields
    if "intermediate_size" in fields:
        values["intermediate_size"] = fields["intermediate_size"] * width // 32
    return ModelConfig(**values | {"hidden_size": width})


def trained(cfg, arena=True, precision="fp32", steps=2):
    model = build_model(cfg, seed=3)
    store = make_store(model, OptimizerConfig(lr=1e-2), precision, arena)
    for _ in range(steps):
        weights = store.working()
        hidden = functional_call(model, weights, (TOKENS[:, :-1],))
        linear_cross_entropy(hidden, weights[model.head_name], TOKENS[:, 1:], scale=1 / 32)[0].backward()
        for weight in weights.values():
            if weight.is_leaf and weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        store.collect()
        store.step(1e-2)
    return store.tensors()


@pytest.mark.parametrize("form", FORMS)
def test_at_the_base_width_nothing_differs(form):
    with_mup, without = (trained(cfg) for cfg in (config(**FORMS[form]), ModelConfig(**BASE | FORMS[form])))
    assert set(with_mup) == set(without)
    assert all(torch.equal(with_mup[name], without[name]) for name in without)


@pytest.mark.parametrize("form", FORMS)
def test_names_tell_which_sides_grow(form):
    with torch.device("meta"):
        small = dict(Transformer(config(**FORMS[form])).named_parameters())
        wide_cfg = config(64, **FORMS[form])
        wide = dict(Transformer(wide_cfg).named_parameters())
    for name, parameter in wide.items():
        grown = [n / m for n, m in zip(parameter.shape, small[name].shape, strict=True)]
        outputs, inputs = mup.widths(name, wide_cfg)
        if name.startswith(("embedding", "position_embedding")):
            assert grown == [1, outputs] and inputs == 1
        elif parameter.ndim == 1:
            assert grown == [outputs] and inputs == 1, name
        else:
            assert grown[-2:] == [outputs, inputs], name


def test_heads_may_grow_in_number_instead_of_size():
    cfg = config(64, num_attention_heads=8, mup_base_head_dim=8, position="rpe")
    assert mup.ratios(cfg) == mup.Ratios(2, 2, 1, 2)
    assert mup.attention_scale(cfg) is None
    assert mup.widths("relative_bias.weight", cfg) == (2, 1)


def test_standard_deviations_and_rates():
    cfg = config(128, moe_num_experts=4, moe_first_layer=1, init_method="normal", output_init_method="normal")
    model = build_model(cfg, 0)
    std = {name: p.std().item() / cfg.init_std for name, p in model.named_parameters() if p.ndim > 1}
    hidden = "layers.0.mlp.up.weight", "layers.0.attention.out.weight", "layers.1.mlp.experts.down.weight"
    for name in hidden:
        assert std[name] == pytest.approx(0.5, rel=0.05)
        assert (mup.rate_factor(name, cfg, "adam"), mup.rate_factor(name, cfg, "sgd")) == (0.25, 1)
    for name in ("embedding.weight", "head.weight"):
        assert std[name] == pytest.approx(1, rel=0.05)
        assert (mup.rate_factor(name, cfg, "adam"), mup.rate_factor(name, cfg, "sgd")) == (1, 4)
    assert std["layers.1.mlp.router.weight"] == pytest.approx(0.25, rel=0.15)
    assert mup.rate_factor("layers.1.mlp.router.weight", cfg, "adam") == 0.25
    assert mup.rate_factor("final_norm.weight", cfg, "sgd") == 4
    assert mup.attention_scale(cfg) == pytest.approx(math.sqrt(8) / 32)
    assert mup.output_factor(cfg) == 0.25


@pytest.mark.parametrize("method", ["small_init", "wang_init", "xavier_normal", "xavier_uniform"])
def test_methods_that_know_the_width_take_the_base_one(method):
    small, wide = (build_model(config(w, init_method=method), 0) for w in (32, 256))
    for name, ratio in (("embedding.weight", 1), ("layers.0.mlp.up.weight", 8**-0.5)):
        stds = [model.get_parameter(name).std().item() for model in (small, wide)]
        assert stds[1] / stds[0] == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize("arena", [True, False])
def test_an_update_moves_by_the_rate_and_decays_alike(arena):
    model = build_model(config(128), 0)
    with torch.no_grad():
        model.layers[0].mlp.up.weight.fill_(1.0)
        model.embedding.weight.fill_(1.0)
    store = make_store(model, OptimizerConfig(weight_decay=0.5), "fp32", arena)
    for name, weight in store.working().items():
        weight.grad = torch.ones_like(weight) if "mlp.up" in name or "embedding" in name else torch.zeros_like(weight)
    store.collect()
    store.step(0.01)
    after = store.tensors()
    assert after["model.layers.0.mlp.up.weight"].flatten()[0].item() == pytest.approx(1 - 0.005 - 0.0025, abs=1e-5)
    assert after["model.embedding.weight"].flatten()[0].item() == pytest.approx(1 - 0.005 - 0.01, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_arena_and_plain_agree(precision):
    arena, plain = (trained(config(64, tie_embeddings=True), arena, precision) for arena in (True, False))
    for name, tensor in plain.items():
        if name.startswith("model.") and tensor.ndim > 1:
            assert (arena[name] - tensor).norm() <= 1e-2 * tensor.norm(), name


def logits_of(model):
    return model.logits(model(TOKENS[:, :-1]))


@torch.no_grad()
def test_the_output_temperature_and_width_divide_logits():
    plain, cooled, wide = (
        build_model(ModelConfig(**BASE | fields), 0)
        for fields in ({}, {"mup_output_temp": 4.0}, {"mup": True, "mup_base_hidden_size": 8, "mup_base_head_dim": 8})
    )
    torch.testing.assert_close(logits_of(cooled), logits_of(plain) / 4)
    wide.load_state_dict(plain.state_dict())
    torch.testing.assert_close(logits_of(wide), logits_of(plain) / 4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "key", "weight"),
    [
        ({}, "mup_embedding_mult", "embedding.weight"),
        ({"position": "learned"}, "mup_rp_embedding_mult", "position_embedding.weight"),
        ({"position": "rpe"}, "mup_rp_embedding_mult", "relative_bias.weight"),
    ],
)
def test_embedding_multipliers(fields, key, weight):
    plain, other = (build_model(ModelConfig(**BASE | fields | more), 0) for more in ({}, {key: 3.0}))
    before = logits_of(plain)
    plain.get_parameter(weight).mul_(3.0)
    assert not torch.allclose(before, logits_of(plain), atol=1e-3)
    torch.testing.assert_close(logits_of(other), logits_of(plain))


@torch.no_grad()
def test_sinusoids_are_multiplied_too():
    plain, other = (
        build_model(ModelConfig(**BASE, position="sinusoidal", mup_rp_embedding_mult=factor), 0)
        for factor in (1.0, 2.0)
    )
    positions = torch.arange(16)
    difference = other._embed(TOKENS[:, :-1], positions, None) - plain._embed(TOKENS[:, :-1], positions, None)
    torch.testing.assert_close(difference[0, 0, 16:], torch.ones(16))  # the cosines of position 0


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 2}, {"attention": "window", "attention_window": 4}])
def test_the_attention_temperature_divides_scores(fields):
    plain, other = (build_model(ModelConfig(**BASE | fields | more), 0) for more in ({}, {"mup_attn_temp": 2.0}))
    heads, group = other.layers[0].attention.k, other.layers[0].attention.n // other.layers[0].attention.k
    for block in plain.layers:
        block.attention.qkv.weight.view(heads, group + 2, 8, 32)[:, :group] /= 2
    torch.testing.assert_close(logits_of(other), logits_of(plain))


def test_the_initial_scale_reaches_every_drawn_matrix():
    plain, other = (build_model(ModelConfig(**BASE, mup_init_scale=factor), 0) for factor in (1.0, 2.0))
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(b, 2 * a if a.ndim > 1 else a), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mup": False}, "model.mup_base_hidden_size is for muP"),
        ({"mup_base_hidden_size": None}, "model.mup needs model.mup_base_hidden_size"),
        ({"norm": "scalenorm"}, "scalenorm"),
        ({"attention": "amlp"}, "amlp"),
        ({"init_method": "orthogonal"}, "orthogonal"),
        ({"block": "file.py:Mine"}, "have no known rule"),
    ],
)
def test_what_has_no_rule_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_factors_that_other_formats_lack_are_known():
    assert mup.factors_at_work(config(32)) is None and mup.factors_at_work(config(64)) == "mup"
    assert mup.factors_at_work(config(32, mup_attn_temp=2.0)) == "mup_attn_temp"


def test_an_optimizer_without_a_rule_is_refused(monkeypatch):
    kind = OptimizerKind(lambda groups, cfg: torch.optim.SGD(groups, lr=cfg.lr), moments=())
    monkeypatch.setitem(optimizers.OPTIMIZERS, "own", kind)
    with pytest.raises(UserError, match=r"no rule for learning rates with optimizer.type 'own'"):
        make_store(build_model(config(64), 0), OptimizerConfig(type="own"), "fp32", True)
    make_store(build_model(ModelConfig(**BASE), 0), OptimizerConfig(type="own"), "fp32", True)
