"""Logits equal those of `transformers` with every parameter randomised; leaving one tensor out is noticed."""

from __future__ import annotations

import pytest
import torch

from castalia.config import ModelConfig
from castalia.convert.huggingface import huggingface_config, to_huggingface
from castalia.generate.engine import make_cache
from castalia.model import Transformer

transformers = pytest.importorskip("transformers", reason="parity is checked against transformers, a dev extra")

NEOX = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 160, "rotary_fraction": 0.25}
LLAMA = {
    "num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 160, "norm": "rmsnorm",
    "activation": "swiglu", "attention_bias": False, "mlp_bias": False, "intermediate_size": 96,
}  # fmt: skip
CASES = {
    "neox-parallel": NEOX | {"residual": "parallel"},
    "neox-sequential": NEOX | {"rotary_fraction": 1.0},
    "neox-tied": NEOX | {"tie_embeddings": True},
    "llama": LLAMA,
    "llama-gqa": LLAMA | {"num_kv_heads": 2, "rotary_base": 500000.0},
    "llama-tied": LLAMA | {"tie_embeddings": True, "num_kv_heads": 4},
}


def random_model(cfg):
    """Every parameter random, biases and gains too, large enough that logits spread by more than 1."""
    model = Transformer(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            p.copy_(mean + 0.2 * torch.randn(p.shape, generator=generator))
    return model


def reference_model(cfg):
    settings = huggingface_config(cfg)
    kind = getattr(transformers, settings["architectures"][0])
    config = kind.config_class(**{k: v for k, v in settings.items() if k != "architectures"})
    config._attn_implementation = "eager"
    return kind(config).eval()


@pytest.fixture(params=CASES, scope="module")
def case(request):
    cfg = ModelConfig(**CASES[request.param], max_position_embeddings=64)
    model = random_model(cfg)
    reference = reference_model(cfg)
    weights = to_huggingface(model.state_dict(), cfg)
    if "embed_out.weight" in weights and "lm_head.weight" in reference.state_dict():
        # Files say embed_out; the class of transformers 5 calls it lm_head and renames while loading.
        weights["lm_head.weight"] = weights.pop("embed_out.weight")
    return cfg, model, reference, weights


def tokens():
    return torch.randint(0, 160, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(model, reference):
    mine, theirs = model.logits(model(tokens())), reference(tokens()).logits
    assert theirs.std() > 1.0
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


def test_logits_equal(case):
    _, model, reference, weights = case
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith(("inv_freq", "lm_head.weight")) for name in missing)
    assert difference(model, reference) < 1e-5


def test_every_tensor_matters(case):
    """The check above would fail if any one tensor had been left at another value."""
    _, model, reference, weights = case
    reference.load_state_dict(weights, strict=False)
    for name, value in weights.items():
        parameter = reference.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)))
        # A key's bias alone is invisible to softmax; NeoX's fused bias also holds those of queries and values.
        assert difference(model, reference) > 1e-4, name
        with torch.no_grad():
            parameter.copy_(value)
    assert difference(model, reference) < 1e-5


@torch.no_grad()
def test_cached_equals_uncached(case):
    cfg, model, _, _ = case
    ids = tokens()
    whole = model.logits(model(ids))
    cache, parts = make_cache(model, 24), []
    for piece in ids.split([7, 1, 1, 9, 6], 1):  # a prompt, single tokens, and chunks after the prompt
        parts.append(model.logits(model(piece, cache=cache)))
        cache.advance(piece.shape[1])
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
