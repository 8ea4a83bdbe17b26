"""transformers' GPT-NeoX, GPT-2, GPT-J and OPT: rows, needs and config.json of each.

GPT-J rotates neighbouring dimensions against each other, we (and all others here) the halves: the rows of
its queries and keys are permuted, which leaves every score as it is. GPT-2 keeps its matrices transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from castalia.config import ModelConfig
from castalia.convert.huggingface_parts import (
    ACTIVATIONS,
    ANY,
    Architecture,
    activation,
    head_row,
    kinds,
    one_of,
    renamed,
    rope_fields,
    rope_settings,
    separate_qkv,
    whole_heads,
)
from castalia.convert.table import Row
from castalia.errors import UserError

_LAYERNORM = {"norm": "layernorm", "position": "learned", "attention_bias": True, "mlp_bias": True}


def _plain_mlp(model: ModelConfig) -> list[tuple[str, bool]]:
    return [one_of(model, ACTIVATIONS), *whole_heads(model)]


# --- GPT-NeoX --------------------------------------------------------------------------------------


def _neox_rows(model: ModelConfig) -> list[Row]:
    rows = [Row(("embedding.weight",), ("gpt_neox.embed_in.weight",))]
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"gpt_neox.layers.{layer}"
        norms = [
            (f"{ours}.attention_norm", f"{theirs}.input_layernorm"),
            (f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm"),
        ]
        attention = [
            (f"{ours}.attention.qkv", f"{theirs}.attention.query_key_value"),
            (f"{ours}.attention.out", f"{theirs}.attention.dense"),
        ]
        mlp = [
            (f"{ours}.mlp.up", f"{theirs}.mlp.dense_h_to_4h"),
            (f"{ours}.mlp.down", f"{theirs}.mlp.dense_4h_to_h"),
        ]
        rows += renamed(norms + mlp, kinds(True)) + renamed(attention, kinds(model.attention_bias))
    rows += renamed([("final_norm", "gpt_neox.final_layer_norm")], kinds(True))
    return rows + head_row(model, "embed_out")


def _neox_settings(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.mlp_size,
        "max_position_embeddings": model.max_position_embeddings,
        "attention_bias": model.attention_bias,
        "hidden_act": ACTIVATIONS[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.residual == "parallel",
        "rope_parameters": rope_settings(model),
        "rotary_pct": model.rotary_fraction,
        "rotary_emb_base": model.rotary_base,
    }


def _neox_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "position": "rotary",
        "norm": "layernorm",
        "norm_epsilon": float(config.get("layer_norm_eps", 1e-5)),
        "activation": activation(config.get("hidden_act", "gelu"), ACTIVATIONS),
        "residual": "parallel" if config.get("use_parallel_residual", True) else "sequential",
        "attention_bias": bool(config.get("attention_bias", True)),
        "mlp_bias": True,
        **rope_fields(config, "rotary_emb_base", "rotary_pct", 0.25),
    }


# --- GPT-2 -----------------------------------------------------------------------------------------


def _transposed(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [t.T.contiguous() for t in tensors]


def _gpt2_rows(model: ModelConfig) -> list[Row]:
    split, join = separate_qkv(model)
    rows = [
        Row(("embedding.weight",), ("transformer.wte.weight",)),
        Row(("position_embedding.weight",), ("transformer.wpe.weight",)),
    ]
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        rows += renamed(
            [(f"{ours}.attention_norm", f"{theirs}.ln_1"), (f"{ours}.mlp_norm", f"{theirs}.ln_2")], kinds(True)
        )
        rows.append(
            Row(
                (f"{ours}.attention.qkv.weight",),
                (f"{theirs}.attn.c_attn.weight",),
                lambda t: _transposed([torch.cat(list(split(t)))]),
                lambda t: join(t[0].T.chunk(3)),
            )
        )
        rows.append(
            Row(
                (f"{ours}.attention.qkv.bias",),
                (f"{theirs}.attn.c_attn.bias",),
                lambda t: [torch.cat(list(split(t)))],
                lambda t: join(t[0].chunk(3)),
            )
        )
        for mine, its in (("attention.out", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
            weight = (f"{ours}.{mine}.weight",), (f"{theirs}.{its}.weight",)
            rows += [
                Row(*weight, _transposed, _transposed),
                *renamed([(f"{ours}.{mine}", f"{theirs}.{its}")], ["bias"]),
            ]
    return rows + renamed([("final_norm", "transformer.ln_f")], kinds(True)) + head_row(model)


def _gpt2_settings(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.mlp_size,
        "n_positions": model.max_position_embeddings,
        "activation_function": ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
    }


def _gpt2_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(key):
            raise UserError(f"{key}: cannot be imported: there is nothing like it here")
    return {
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "num_attention_heads": config["n_head"],
        "intermediate_size": config.get("n_inner"),
        "max_position_embeddings": config["n_positions"],
        "position": "learned",
        "norm": "layernorm",
        "norm_epsilon": float(config.get("layer_norm_epsilon", 1e-5)),
        "activation": activation(config.get("activation_function", "gelu_new"), ACTIVATIONS),
        "residual": "sequential",
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "attention_bias": True,
        "mlp_bias": True,
    }


# --- GPT-J -----------------------------------------------------------------------------------------


def halves(model: ModelConfig) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Rows [n d, ...] of heads whose rotated dimensions are neighbours, to halves; and back."""
    r, d = model.rotary_dim, model.head_size
    order = torch.cat([torch.arange(0, r, 2), torch.arange(1, r, 2), torch.arange(r, d)])

    def permuted(x: Tensor, order: Tensor) -> Tensor:
        return x.reshape(-1, d, *x.shape[1:])[:, order].reshape(x.shape)

    return lambda x: permuted(x, order), lambda x: permuted(x, order.argsort())


def _gptj_rows(model: ModelConfig) -> list[Row]:
    split, join = separate_qkv(model)
    to_halves, to_pairs = halves(model)

    def theirs_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        q, k, v = split(tensors)
        return [to_pairs(q), to_pairs(k), v]

    def ours_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return join([to_halves(tensors[0]), to_halves(tensors[1]), tensors[2]])

    rows = [Row(("embedding.weight",), ("transformer.wte.weight",))]
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        separate = tuple(f"{theirs}.attn.{part}_proj.weight" for part in "qkv")
        rows.append(Row((f"{ours}.attention.qkv.weight",), separate, theirs_of, ours_of))
        rows += renamed([(f"{ours}.attention.out", f"{theirs}.attn.out_proj")], kinds(False))
        pairs = (("attention_norm", "ln_1"), ("mlp.up", "mlp.fc_in"), ("mlp.down", "mlp.fc_out"))
        rows += renamed([(f"{ours}.{mine}", f"{theirs}.{its}") for mine, its in pairs], kinds(True))
    return rows + renamed([("final_norm", "transformer.ln_f")], kinds(True)) + head_row(model)


def _gptj_settings(model: ModelConfig) -> dict[str, Any]:
    return _gpt2_settings(model) | {"rotary_dim": model.rotary_dim}


def _gptj_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    size = config["n_embd"] // config["n_head"]
    return _gpt2_fields(config) | {
        "position": "rotary",
        "rotary_fraction": (config.get("rotary_dim") or size) / size,
        "residual": "parallel",
        "tie_norms": True,
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "attention_bias": False,
        "head_bias": True,
    }


# --- OPT -------------------------------------------------------------------------------------------

_OPT_OFFSET = 2


def _opt_rows(model: ModelConfig) -> list[Row]:
    split, join = separate_qkv(model)
    rows = [
        Row(("embedding.weight",), ("model.decoder.embed_tokens.weight",)),
        Row(("position_embedding.weight",), ("model.decoder.embed_positions.weight",)),
    ]
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.decoder.layers.{layer}"
        for kind in kinds(True):
            separate = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            rows.append(Row((f"{ours}.attention.qkv.{kind}",), separate, split, join))
        pairs = (
            *(("attention.out", "self_attn.out_proj"), ("attention_norm", "self_attn_layer_norm")),
            *(("mlp.up", "fc1"), ("mlp.down", "fc2"), ("mlp_norm", "final_layer_norm")),
        )
        rows += renamed([(f"{ours}.{mine}", f"{theirs}.{its}") for mine, its in pairs], kinds(True))
    return rows + renamed([("final_norm", "model.decoder.final_layer_norm")], kinds(True)) + head_row(model)


def _opt_needs(model: ModelConfig) -> list[tuple[str, bool]]:
    return [*_plain_mlp(model), ("model.norm_epsilon 1e-5", model.norm_epsilon == 1e-5)]


def _opt_settings(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "word_embed_proj_dim": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "ffn_dim": model.mlp_size,
        "max_position_embeddings": (model.max_position_embeddings or 0) - _OPT_OFFSET,
        "activation_function": ACTIVATIONS[model.activation],
        "do_layer_norm_before": True,
    }


def _opt_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    projected = config.get("word_embed_proj_dim") not in (None, config["hidden_size"])
    if projected or not config.get("do_layer_norm_before", True) or config.get("_remove_final_layer_norm"):
        raise UserError(
            "word_embed_proj_dim, do_layer_norm_before: an OPT whose embeddings are projected, or whose norms come "
            "after the residual sum, cannot be imported (of the released ones, this is OPT-350m): take another size"
        )
    for key, value in (("enable_bias", True), ("layer_norm_elementwise_affine", True)):
        if config.get(key, value) != value:
            raise UserError(f"{key}: false cannot be imported: take a model with biases")
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "intermediate_size": config["ffn_dim"],
        "max_position_embeddings": config["max_position_embeddings"] + _OPT_OFFSET,
        "position": "learned",
        "position_offset": _OPT_OFFSET,
        "norm": "layernorm",
        "norm_epsilon": 1e-5,
        "activation": activation(config.get("activation_function", "relu"), ACTIVATIONS),
        "residual": "sequential",
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "attention_bias": True,
        "mlp_bias": True,
    }


GPT_ARCHITECTURES = (
    Architecture(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        ("embed_out.weight", "lm_head.weight"),
        _neox_rows,
        {
            **{"norm": "layernorm", "residual": ("parallel", "sequential"), "mlp_bias": True},
            **{"rotary_fraction": ANY, "rotary_scaling": ("none", "linear", "llama3", "yarn")},
        },
        _plain_mlp,
        _neox_settings,
        _neox_fields,
    ),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        ("lm_head.weight",),
        _gpt2_rows,
        _LAYERNORM | {"position_offset": 0},
        _plain_mlp,
        _gpt2_settings,
        _gpt2_fields,
    ),
    Architecture(
        "gptj",
        "GPTJForCausalLM",
        ("lm_head.weight",),
        _gptj_rows,
        {
            **{"norm": "layernorm", "residual": "parallel", "tie_norms": True, "rotary_fraction": ANY},
            **{"attention_bias": False, "mlp_bias": True, "head_bias": True, "tie_embeddings": False},
            "rotary_base": 10000.0,
        },
        _plain_mlp,
        _gptj_settings,
        _gptj_fields,
    ),
    Architecture(
        "opt",
        "OPTForCausalLM",
        ("lm_head.weight",),
        _opt_rows,
        _LAYERNORM | {"position_offset": _OPT_OFFSET},
        _opt_needs,
        _opt_settings,
        _opt_fields,
    ),
)
