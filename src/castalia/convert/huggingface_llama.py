"""transformers' Llama and its relatives: one table of rows, and what each of them has of its own.

llama       rotary scaling, biases everywhere or nowhere
mistral     every layer sees a window
qwen2       biases of queries, keys and values alone
qwen3       queries and keys normed head by head
olmo2       norms after the branches, queries and keys normed in full
mixtral     experts in every layer
qwen3_moe   qwen3 with experts in every k-th layer
olmoe       experts, queries and keys normed in full
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from castalia.config import ModelConfig
from castalia.convert.huggingface_parts import (
    ANY,
    GATED_ACTIVATIONS,
    Architecture,
    activation,
    head_row,
    kinds,
    one_of,
    renamed,
    rope_fields,
    rope_settings,
    separate_qkv,
)
from castalia.convert.table import Row
from castalia.errors import UserError

_BASE: dict[str, Any] = {
    "norm": "rmsnorm",
    "rotary_scaling": ("none", "linear", "llama3", "yarn"),
    "attention_bias": False,
    "mlp_bias": False,
}
_EXPERTS: dict[str, Any] = {"moe_num_experts": 1, "moe_score": "softmax", "moe_shared_experts": 0, "moe_bias_rate": 0}
Settings = Callable[[ModelConfig], dict[str, Any]]
Fields = Callable[[Mapping[str, Any]], dict[str, Any]]

# Where a layer's parts are, by model_type where this differs.
_NORMS = {"olmo2": ("post_attention_layernorm", "post_feedforward_layernorm")}
_MOE = {"mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"})}
_MOE_ELSE = ("mlp.gate", "mlp.experts", {part: f"{part}_proj" for part in ("gate", "up", "down")})


def _stacked(ours: str, theirs: list[str]) -> Row:
    """Our stack of experts, and one matrix for each of theirs."""
    return Row((ours,), tuple(theirs), lambda t: [m.clone() for m in t[0].unbind()], lambda t: [torch.stack(list(t))])


def _rows(model_type: str) -> Callable[[ModelConfig], list[Row]]:
    def rows(model: ModelConfig) -> list[Row]:
        split, join = separate_qkv(model)
        before, after = _NORMS.get(model_type, ("input_layernorm", "post_attention_layernorm"))
        table = [Row(("embedding.weight",), ("model.embed_tokens.weight",))]
        for layer in range(model.num_layers):
            ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
            norms = [("attention_norm", before), ("mlp_norm", after)]
            if model.qk_norm:
                norms += [(f"attention.{part}_norm", f"self_attn.{part}_norm") for part in "qk"]
            table += renamed([(f"{ours}.{mine}", f"{theirs}.{its}") for mine, its in norms], kinds(False))
            for kind in kinds(model.attention_bias):
                separate = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
                table.append(Row((f"{ours}.attention.qkv.{kind}",), separate, split, join))
            out = [(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj")]
            table += renamed(out, kinds(model.attention_bias and model.attention_out_bias))
            if not model.has_experts(layer):
                mlp = [(f"{ours}.mlp.{part}", f"{theirs}.mlp.{part}_proj") for part in ("gate", "up", "down")]
                table += renamed(mlp, kinds(model.mlp_bias))
                continue
            router, experts, parts = _MOE.get(model_type, _MOE_ELSE)
            table += renamed([(f"{ours}.mlp.router", f"{theirs}.{router}")], kinds(False))
            for mine, its in parts.items():
                names = [f"{theirs}.{experts}.{e}.{its}.weight" for e in range(model.moe_num_experts)]
                table.append(_stacked(f"{ours}.mlp.experts.{mine}.weight", names))
        return table + renamed([("final_norm", "model.norm")], kinds(False)) + head_row(model)

    return rows


def _settings(own: Settings) -> Settings:
    def settings(model: ModelConfig) -> dict[str, Any]:
        return {
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_size,
            "intermediate_size": model.mlp_size,
            "max_position_embeddings": model.max_position_embeddings,
            "hidden_act": GATED_ACTIVATIONS[model.activation],
            "rms_norm_eps": model.norm_epsilon,
            "attention_bias": model.attention_bias,
            "rope_parameters": rope_settings(model),
            "rope_theta": model.rotary_base,  # where releases before transformers 5 look for it
        } | own(model)

    return settings


def _fields(own: Fields) -> Fields:
    def fields(config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("pretraining_tp") not in (None, 1):
            raise UserError(f"pretraining_tp: {config['pretraining_tp']} is not supported: only 1 is")
        if config.get("clip_qkv") is not None:
            raise UserError("clip_qkv: cannot be imported: nothing clips queries and keys here")
        return {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "num_attention_heads": config["num_attention_heads"],
            "num_kv_heads": config.get("num_key_value_heads"),
            "head_dim": config.get("head_dim"),
            "intermediate_size": config["intermediate_size"],
            "max_position_embeddings": config["max_position_embeddings"],
            "position": "rotary",
            "norm": "rmsnorm",
            "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
            "activation": activation(config.get("hidden_act", "silu"), GATED_ACTIVATIONS),
            "residual": "sequential",
            "attention_bias": bool(config.get("attention_bias", False)),
            "mlp_bias": bool(config.get("mlp_bias", False)),
            **rope_fields(config, fraction_key="partial_rotary_factor"),
        } | own(config)

    return fields


def _nothing(_: Any) -> dict[str, Any]:
    return {}


def _relative(
    model_type: str,
    class_name: str,
    needs: Mapping[str, Any],
    settings: Settings = _nothing,
    fields: Fields = _nothing,
    further: Callable[[ModelConfig], list[tuple[str, bool]]] = lambda model: [],
) -> Architecture:
    return Architecture(
        model_type,
        class_name,
        ("lm_head.weight",),
        _rows(model_type),
        _BASE | dict(needs),
        lambda model: [one_of(model, GATED_ACTIVATIONS), *further(model)],
        _settings(settings),
        _fields(fields),
    )


def _whole_width(model: ModelConfig) -> list[tuple[str, bool]]:
    divides = model.hidden_size % model.num_attention_heads == 0
    return [("model.hidden_size a multiple of model.num_attention_heads", divides)]


def _no_windows(config: Mapping[str, Any]) -> None:
    if config.get("use_sliding_window"):
        raise UserError("use_sliding_window: true cannot be imported: take a model whose layers see everything")


def _every_layer(model: ModelConfig) -> list[tuple[str, bool]]:
    everywhere = model.moe_first_layer == 0 and model.moe_interval == 1
    return [("model.moe_first_layer 0 and model.moe_interval 1", everywhere)]


def _window_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    window = config.get("sliding_window")
    return {} if window is None else {"attention": "window", "attention_window": window}


def _qwen2_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    _no_windows(config)
    return {"attention_bias": True, "attention_out_bias": False}


def _qwen3_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    _no_windows(config)
    # Its own default, unlike Llama's hidden_size / num_attention_heads.
    return {"qk_norm": "head", "head_dim": config.get("head_dim", 128)}


def _mixtral_settings(model: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size": model.expert_size,
        "num_local_experts": model.moe_num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "sliding_window": None,
    }


def _mixtral_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return _window_fields(config) | {
        "moe_num_experts": config["num_local_experts"],
        "moe_top_k": config["num_experts_per_tok"],
        "moe_normalise": True,
    }


def _experts_settings(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.moe_num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "norm_topk_prob": model.moe_normalise,
    }


def _experts_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "moe_num_experts": config["num_experts"],
        "moe_top_k": config["num_experts_per_tok"],
        "moe_normalise": bool(config.get("norm_topk_prob", False)),
    }


def _qwen3_moe_settings(model: ModelConfig) -> dict[str, Any]:
    return _experts_settings(model) | {
        "moe_intermediate_size": model.expert_size,
        "decoder_sparse_step": model.moe_interval,
        "mlp_only_layers": [],
    }


def _qwen3_moe_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("mlp_only_layers"):
        raise UserError("mlp_only_layers: cannot be imported: experts are in every so many layers here")
    step = config.get("decoder_sparse_step", 1)
    return {
        **_qwen3_fields(config),
        **_experts_fields(config),
        "head_dim": config.get("head_dim"),
        "moe_intermediate_size": config["moe_intermediate_size"],
        "moe_interval": step,
        "moe_first_layer": step - 1,
    }


def _every_kth(model: ModelConfig) -> list[tuple[str, bool]]:
    return [("model.moe_first_layer one below model.moe_interval", model.moe_first_layer == model.moe_interval - 1)]


def _olmoe_settings(model: ModelConfig) -> dict[str, Any]:
    return _experts_settings(model) | {"intermediate_size": model.expert_size}


LLAMA_ARCHITECTURES = (
    _relative(
        "llama",
        "LlamaForCausalLM",
        {"attention_bias": ANY, "mlp_bias": ANY},
        lambda model: {"mlp_bias": model.mlp_bias},
        further=_whole_width,
    ),
    _relative(
        "mistral",
        "MistralForCausalLM",
        {"attention": "window"},
        lambda model: {"sliding_window": model.attention_window},
        _window_fields,
    ),
    _relative(
        "qwen2",
        "Qwen2ForCausalLM",
        {"attention_bias": True, "attention_out_bias": False},
        lambda model: {"use_sliding_window": False},
        _qwen2_fields,
    ),
    _relative(
        "qwen3",
        "Qwen3ForCausalLM",
        {"attention_bias": ANY, "qk_norm": "head"},
        lambda model: {"use_sliding_window": False},
        _qwen3_fields,
    ),
    _relative(
        "olmo2",
        "Olmo2ForCausalLM",
        {"attention_bias": ANY, "qk_norm": "full", "norm_placement": "post"},
        fields=lambda config: {"qk_norm": "full", "norm_placement": "post"},
        further=_whole_width,
    ),
    _relative(
        "mixtral",
        "MixtralForCausalLM",
        _EXPERTS | {"moe_normalise": True},
        _mixtral_settings,
        _mixtral_fields,
        _every_layer,
    ),
    _relative(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _EXPERTS | {"attention_bias": ANY, "qk_norm": "head"},
        _qwen3_moe_settings,
        _qwen3_moe_fields,
        _every_kth,
    ),
    _relative(
        "olmoe",
        "OlmoeForCausalLM",
        _EXPERTS | {"attention_bias": ANY, "qk_norm": "full"},
        _olmoe_settings,
        lambda config: {"qk_norm": "full", **_experts_fields(config)},
        lambda model: [*_whole_width(model), *_every_layer(model)],
    ),
)
