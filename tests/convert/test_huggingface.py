"""Hugging Face's classes compute what ours do, and both directions agree bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from castalia.config import ModelConfig
from castalia.convert import from_huggingface, huggingface_config, model_config_fields, to_huggingface
from castalia.convert.huggingface import ARCHITECTURES
from castalia.errors import UserError
from castalia.model.transformer import build_model

NEOX: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "rotary_fraction": 0.25,
    "rotary_base": 1000.0,
    "residual": "parallel",
}
LLAMA = NEOX | {
    "norm": "rmsnorm",
    "norm_epsilon": 1e-6,
    "activation": "swiglu",
    "residual": "sequential",
    "rotary_fraction": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "intermediate_size": 48,
}
MODELS = {
    "neox": NEOX,
    "neox sequential": NEOX | {"residual": "sequential", "rotary_fraction": 1.0, "activation": "gelu_tanh"},
    "neox tied": NEOX | {"tie_embeddings": True, "intermediate_size": 40},
    "neox mish": NEOX | {"activation": "mish"},
    "neox without attention biases": NEOX | {"attention_bias": False},
    "llama": LLAMA,
    "llama grouped": LLAMA | {"num_kv_heads": 2},
    "llama one key head": LLAMA | {"num_kv_heads": 1, "activation": "geglu"},
    "llama tied": LLAMA | {"tie_embeddings": True},
    "llama biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "num_kv_heads": 2},
    "llama sigmoid gate": LLAMA | {"activation": "glu"},
    "llama bilinear": LLAMA | {"activation": "bilinear"},
    "llama small heads": LLAMA | {"head_dim": 4, "num_kv_heads": 2},
}


def random_weights(model: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.3 * torch.randn(tensor.shape, generator=generator) + (1 if "norm.weight" in name else 0)
        for name, tensor in build_model(model, 1).state_dict().items()
    }


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_there_and_back(fields: dict[str, Any]) -> None:
    model = ModelConfig(**fields)
    weights = random_weights(model)
    theirs = to_huggingface(weights, model)
    back = from_huggingface(theirs, model)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in weights.values())
    again = ModelConfig(**model_config_fields(huggingface_config(model)))
    for key in fields | {"norm": 0, "activation": 0, "position": 0}:
        assert getattr(again, key) == getattr(model, key) or key in ("num_kv_heads", "head_dim"), key
    assert (again.kv_heads, again.head_size, again.mlp_size) == (
        model.kv_heads,
        model.head_size,
        model.mlp_size,
    )


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_logits(tmp_path: Path, fields: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    cfg = ModelConfig(**fields)
    weights = random_weights(cfg)
    ours = build_model(cfg, 1)
    ours.load_state_dict(weights)
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(cfg, eod=0)))
    safetensors.save_file(to_huggingface(weights, cfg), tmp_path / "model.safetensors", {"format": "pt"})
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(theirs).__name__ == huggingface_config(cfg)["architectures"][0]
    assert theirs.config.eos_token_id == 0
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        a, b = ours.logits(ours(tokens)), theirs.eval()(tokens).logits
    torch.testing.assert_close(a.view_as(b), b, atol=2e-5, rtol=1e-5)
    # What transformers holds (a tied output matrix included) and what it writes is read again.
    theirs.save_pretrained(tmp_path / "again")
    for state in (theirs.state_dict(), safetensors.load_file(tmp_path / "again" / "model.safetensors")):
        back = from_huggingface(state, cfg)
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    read = ModelConfig(**model_config_fields(json.loads((tmp_path / "again" / "config.json").read_text())))
    assert (read.rotary_dim, read.rotary_base, read.residual) == (
        cfg.rotary_dim,
        cfg.rotary_base,
        cfg.residual,
    )
    assert (read.norm_epsilon, read.activation, read.kv_heads) == (
        cfg.norm_epsilon,
        cfg.activation,
        cfg.kv_heads,
    )
    assert (read.attention_bias, read.mlp_bias) == (cfg.attention_bias, cfg.mlp_bias)


@pytest.mark.parametrize("fields", [NEOX, LLAMA], ids=["neox", "llama"])
def test_what_does_not_fit_is_refused(fields: dict[str, Any]) -> None:
    model = ModelConfig(**fields)
    theirs = to_huggingface(random_weights(model), model)
    first = next(iter(theirs))
    with pytest.raises(UserError, match=f"does not hold {first}"):
        from_huggingface({n: t for n, t in theirs.items() if n != first}, model)
    with pytest.raises(UserError, match=r"no place for: extra\.weight"):
        from_huggingface(theirs | {"extra.weight": torch.ones(1)}, model)
    with pytest.raises(UserError, match=r"does not hold .*layers\.2\."):
        from_huggingface(theirs, ModelConfig(**(fields | {"num_layers": 3})))
    weights = random_weights(model)
    with pytest.raises(UserError, match=r"does not hold final_norm\.weight"):
        to_huggingface({n: t for n, t in weights.items() if n != "final_norm.weight"}, model)


def test_a_tied_head_that_differs_is_refused() -> None:
    tied = ModelConfig(**MODELS["neox tied"])
    theirs = to_huggingface(random_weights(tied), tied)
    buffers = {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}
    same = from_huggingface(theirs | buffers | {"embed_out.weight": theirs["gpt_neox.embed_in.weight"].clone()}, tied)
    assert "head.weight" not in same
    with pytest.raises(UserError, match="set model.tie_embeddings=false"):
        from_huggingface(theirs | {"embed_out.weight": torch.zeros(64, 32)}, tied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"position": "none", "rotary_fraction": 1.0},
            "GPTNeoXForCausalLM needs model.position rotary; GPT2LMHeadModel needs model.position learned",
        ),
        ({"norm": "rmsnorm"}, "GPTNeoXForCausalLM needs model.norm layernorm"),
        ({"mlp_bias": False}, "model.mlp_bias true"),
        ({"num_kv_heads": 2}, "as many key/value heads"),
        ({"activation": "mine:act"}, "model.activation one of gelu, gelu_tanh, relu, silu"),
    ],
)
def test_models_they_have_no_class_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        huggingface_config(ModelConfig(**(NEOX | changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bloom"}, "'bloom' cannot be imported: known are gpt2, gpt_neox, gptj, llama"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}}, "'dynamic' cannot be imported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}}, "attention_factor: "),
        ({"clip_qkv": 8.0}, "nothing clips"),
        ({"hidden_act": "mish"}, "'mish' cannot be imported"),
        ({"pretraining_tp": 2}, "only 1 is"),
    ],
)
def test_configurations_we_have_nothing_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_config_fields(huggingface_config(ModelConfig(**LLAMA)) | changes)
    with pytest.raises(UserError, match="has no vocab_size"):
        model_config_fields(
            {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 1}
            | dict.fromkeys(("num_attention_heads", "intermediate_size"), 1)
        )


def test_an_older_config_is_read() -> None:
    """As transformers 4 wrote it: rotary settings at the top level."""
    old = huggingface_config(ModelConfig(**NEOX))
    del old["rope_parameters"]
    fields = model_config_fields(old)
    assert (fields["rotary_base"], fields["rotary_fraction"]) == (1000.0, 0.25)
    llama = huggingface_config(ModelConfig(**LLAMA))
    del llama["rope_parameters"]
    assert model_config_fields(llama)["rotary_base"] == 1000.0
    with pytest.raises(UserError, match="an export needs it"):
        huggingface_config(ModelConfig(**(NEOX | {"vocab_size": None})))


WRITTEN = "config.json has it, and an import reads it back"
NO_EFFECT = "the function is the same"


@dataclass(frozen=True)
class Fate:
    """What becomes of a field: WRITTEN, NO_EFFECT, or the field that the obstacle names.

    Attributes:
        value: other than in NEOX and LLAMA; `llama_value` where these differ.
        neox, llama: what becomes of it.
        others: what has to be changed with it.
    """

    value: Any
    neox: str = WRITTEN
    llama: str = WRITTEN
    others: dict[str, Any] = field(default_factory=dict)
    llama_value: Any = None


def obstacle(value: Any, name: str, **others: Any) -> Fate:
    return Fate(value, name, name, others)


SCALED = {"rotary_scaling": "yarn", "rotary_scaling_factor": 2.0, "rotary_original_length": 16}
WITH_MUP = {"mup": True, "mup_base_hidden_size": 8}
MUP_FACTORS = ("mup_attn_temp", "mup_output_temp", "mup_embedding_mult", "mup_rp_embedding_mult")
OF_EXPERTS = {
    **{"moe_top_k": 1, "moe_first_layer": 1, "moe_interval": 2, "moe_intermediate_size": 24, "moe_jitter": 0.1},
    **{"moe_shared_experts": 1, "moe_router": "sinkhorn", "moe_score": "sigmoid", "moe_normalise": False},
    "moe_bias_rate": 0.1,
}
# Of kinds of attention that these models do not have.
OF_OTHER_ATTENTION = {
    **{"attention_window": 3, "attention_block": 4, "attention_local_blocks": 2, "attention_global_blocks": 2},
    **{"attention_global_patterns": 2, "attention_sliding_blocks": 5, "attention_random_blocks": 2, "amlp_size": 8},
    **{"attention_window_blocks": [2], "attention_global_starts": [1], "attention_global_ends": [2]},
    **{"attention_per_head": True, "attention_seed": 7, "attention_core": "castalia.model.attention:attend"},
}

FATES: dict[str, Fate] = {
    "block": obstacle("mine:Block", "block"),
    "num_layers": Fate(3),
    "hidden_size": Fate(64),
    "num_attention_heads": Fate(2),
    "num_kv_heads": Fate(2, neox="num_kv_heads"),
    "head_dim": Fate(4, neox="head_dim", others={"rotary_fraction": 1.0}),
    "intermediate_size": Fate(40),
    "vocab_size": Fate(80),
    "vocab_multiple": Fate(64, NO_EFFECT, NO_EFFECT),
    "max_position_embeddings": Fate(32),
    "norm": obstacle("rmsnorm_eps_outside", "norm"),
    "norm_epsilon": Fate(1e-3),
    "norm_placement": obstacle("post", "norm_placement", residual="sequential"),
    "qk_norm": obstacle(True, "qk_norm"),
    "tie_norms": obstacle(True, "tie_norms", residual="parallel"),
    "activation": obstacle("softsign", "activation"),
    "position": obstacle("alibi", "position"),
    "position_offset": obstacle(3, "position", position="learned"),
    "stable_embedding": obstacle("tokens", "stable_embedding"),
    "rotary_fraction": Fate(0.5, llama="rotary_fraction"),
    "rotary_base": Fate(500.0),
    "rotary_scaling": Fate("linear"),
    "rotary_scaling_factor": Fate(4.0, others={"rotary_scaling": "linear"}),
    "rotary_original_length": Fate(8, others=SCALED),
    "rotary_scaling_low": Fate(0.5, others=SCALED),
    "rotary_scaling_high": Fate(16.0, others=SCALED),
    "rpe_num_buckets": Fate(16, NO_EFFECT, NO_EFFECT),
    "rpe_max_distance": Fate(64, NO_EFFECT, NO_EFFECT),
    "residual": Fate("sequential", llama="residual", llama_value="parallel"),
    "attention_bias": Fate(False, llama_value=True),
    "attention_out_bias": obstacle(False, "attention_out_bias", attention_bias=True),
    "mlp_bias": Fate(False, neox="mlp_bias", llama_value=True),
    "hidden_dropout": Fate(0.5, NO_EFFECT, NO_EFFECT),
    "attention_dropout": Fate(0.5, NO_EFFECT, NO_EFFECT),
    "tie_embeddings": Fate(True),
    "head_bias": obstacle(True, "head_bias"),
    "moe_num_experts": obstacle(4, "moe_num_experts"),
    **{name: obstacle(value, "moe_num_experts", moe_num_experts=4) for name, value in OF_EXPERTS.items()},
    "mtp_depth": Fate(1, NO_EFFECT, NO_EFFECT),
    "attention": obstacle("local", "attention"),
    **{name: Fate(value, NO_EFFECT, NO_EFFECT) for name, value in OF_OTHER_ATTENTION.items()},
    "num_unique_layers": obstacle(1, "num_unique_layers"),
    "param_sharing_style": Fate("spaced", NO_EFFECT, NO_EFFECT),
    "soft_prompt_tokens": obstacle(2, "soft_prompt_tokens"),
    "soft_prompt_text": obstacle("once", "soft_prompt_tokens", soft_prompt_tokens=2),
    "soft_prompt_range": Fate(0.1, NO_EFFECT, NO_EFFECT),
    "init_method": Fate("normal", NO_EFFECT, NO_EFFECT),
    "output_init_method": Fate("normal", NO_EFFECT, NO_EFFECT),
    "init_std": Fate(0.01, NO_EFFECT, NO_EFFECT),
    "mup": obstacle(True, "mup", mup_base_hidden_size=8),
    **{f"mup_base_{name}": obstacle(4, "mup", **WITH_MUP) for name in ("intermediate_size", "head_dim")},
    "mup_base_hidden_size": obstacle(4, "mup", mup=True),
    "mup_init_scale": Fate(2.0, NO_EFFECT, NO_EFFECT),
    **{name: obstacle(2.0, name) for name in MUP_FACTORS},
}


def test_every_field_of_the_model_has_a_fate() -> None:
    """A new field must be written, be an obstacle, or leave the function as it is: say which."""
    assert FATES.keys() == ModelConfig.model_fields.keys()


@pytest.mark.parametrize("name", FATES)
@pytest.mark.parametrize(("kind", "fields"), [("gpt_neox", NEOX), ("llama", LLAMA)])
def test_no_field_is_lost_in_an_export(kind: str, fields: dict[str, Any], name: str) -> None:
    fate = FATES[name]
    outcome, value = (fate.neox, fate.value) if kind == "gpt_neox" else (fate.llama, fate.llama_value or fate.value)
    before = ModelConfig(**fields)
    after = ModelConfig(**(fields | fate.others | {name: value}))
    assert getattr(after, name) != getattr(before, name)
    obstacles = ARCHITECTURES[kind].obstacles(after)
    assert ARCHITECTURES[kind].obstacles(before) == []
    if outcome not in (WRITTEN, NO_EFFECT):
        assert any(text.startswith(f"model.{outcome} ") for text in obstacles)
        return
    assert obstacles == []
    settings = huggingface_config(after)
    assert settings["model_type"] == kind
    if outcome == WRITTEN:
        assert getattr(ModelConfig(**model_config_fields(settings)), name) == value
        return
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(4))
    weights, logits = random_weights(before), []
    for cfg in (before, after):
        model = build_model(cfg, 1)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all(n.startswith("mtp.") for n in missing)
        logits.append(model.logits(model(tokens)))
    assert torch.equal(*logits)


def test_two_names_of_one_function_are_both_exported() -> None:
    assert huggingface_config(ModelConfig(**(NEOX | {"activation": "swish"})))["hidden_act"] == "silu"
