"""Our weights and model section <-> those of Hugging Face's GPTNeoXForCausalLM and LlamaForCausalLM.

    weights      ──rows of the architecture──>  state dict      (names of transformers' classes)
    ModelConfig  ──fields──────────────────────>  config.json

Which of the two a model is follows from its configuration; one that is neither is refused with
the fields that stand in the way. Neither needs its rotary rows permuted: both rotate halves, as we do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castalia.config import ModelConfig
from castalia.convert.table import Row, join_qkv, split_qkv, to_ours, to_theirs
from castalia.errors import UserError

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
}
# The gate's function; `glu` is the sigmoid's, `bilinear` has none.
_GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "linear"}
# Other names that transformers has for the same function.
_SYNONYMS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "swish": "silu"}

# Buffers of older releases, which follow from the configuration.
_IGNORED = re.compile(r"\.attention\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Architecture:
    """One class of transformers.

    Attributes:
        model_type, class_name: as config.json names it.
        heads: their names of the output matrix (the first is the one in files; transformers 5 has another one
            in memory). A tied model has none.
        rows: the table.
        obstacles: which fields of a configuration it cannot express, as sentences.
        settings: the part of config.json that is particular to it.
        fields: the part of our model section that is particular to it.
    """

    model_type: str
    class_name: str
    heads: tuple[str, ...]
    rows: Callable[[ModelConfig], list[Row]]
    obstacles: Callable[[ModelConfig], list[str]]
    settings: Callable[[ModelConfig], dict[str, Any]]
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]


def to_huggingface(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our weights under transformers' names, dtypes as they are. A tied model's has no output matrix.

    Raises:
        UserError: no class of transformers computes this model; a weight is missing or left over.
    """
    return to_theirs(architecture_of(model).rows(model), weights, "the weights")


def from_huggingface(state_dict: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """transformers' weights under our names, as fp32; the inverse of `to_huggingface`.

    Raises:
        UserError: a tensor is missing, left over, or does not fit the configuration.
    """
    architecture = architecture_of(model)
    rows = architecture.rows(model)
    found = {name: tensor for name, tensor in state_dict.items() if not _IGNORED.search(name)}
    head, *others = architecture.heads
    for other in others:
        if other in found:
            found[head] = found.pop(other)
    if model.tie_embeddings and head in found:
        embedding = next(row.theirs[0] for row in rows if row.ours == ("embedding.weight",))
        if not torch.equal(found.pop(head), found.get(embedding, torch.empty(0))):
            raise UserError(
                f"{head}: differs from {embedding}, though the configuration ties them: set model.tie_embeddings=false"
            )
    return {name: tensor.float() for name, tensor in to_ours(rows, found, "the Hugging Face weights").items()}


def huggingface_config(model: ModelConfig, *, eod: int | None = None, dtype: str = "float32") -> dict[str, Any]:
    """config.json of a model.

    Args:
        model: complete: vocab_size and max_position_embeddings are not null.
        eod: the end-of-document id, which is where their texts begin and end.
        dtype: of the weights beside it, in torch's spelling.

    Raises:
        UserError: no class of transformers computes this model, or it is not complete.
    """
    for key in ("vocab_size", "max_position_embeddings"):
        if getattr(model, key) is None:
            raise UserError(f"model.{key}: an export needs it: give the configuration of the run's folder")
    architecture = architecture_of(model)
    rope = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rotary_fraction != 1:
        rope["partial_rotary_factor"] = model.rotary_fraction
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.mlp_size,
        "max_position_embeddings": model.max_position_embeddings,
        "attention_bias": model.attention_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "use_cache": True,
        "torch_dtype": dtype,
        "rope_parameters": rope,  # since transformers 5; the names before it are among the settings
    } | architecture.settings(model)


def model_config_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our model section that a config.json determines.

    Raises:
        UserError: another architecture, or settings that we have nothing for.
    """
    model_type = hf_config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(f"model_type: '{model_type}' cannot be imported: known are {', '.join(sorted(ARCHITECTURES))}")
    try:
        common = {
            "num_layers": hf_config["num_hidden_layers"],
            "hidden_size": hf_config["hidden_size"],
            "num_attention_heads": hf_config["num_attention_heads"],
            "intermediate_size": hf_config["intermediate_size"],
            "vocab_size": hf_config["vocab_size"],
            "max_position_embeddings": hf_config["max_position_embeddings"],
            "position": "rotary",
            "tie_embeddings": bool(hf_config.get("tie_word_embeddings", False)),
        }
        return common | ARCHITECTURES[model_type].fields(hf_config)
    except KeyError as error:
        raise UserError(f"config.json: has no {error.args[0]}: fetch it again") from None


def architecture_of(model: ModelConfig) -> Architecture:
    """Which class of transformers computes this model.

    Raises:
        UserError: none does.
    """
    reasons = []
    for architecture in ARCHITECTURES.values():
        obstacles = architecture.obstacles(model)
        if not obstacles:
            return architecture
        reasons.append(f"{architecture.class_name} needs {', '.join(obstacles)}")
    raise UserError(f"model: Hugging Face's classes do not compute it ({'; '.join(reasons)}): export it as GPT-NeoX")


def _common_needs(model: ModelConfig) -> list[tuple[str, bool]]:
    """What both classes need. Dropout, initial values and the vocabulary's rounding do not change the function."""
    return [
        ("model.block transformer", model.block == "transformer"),
        ("model.position rotary", model.position == "rotary"),
        ("model.qk_norm false", not model.qk_norm),
        ("model.tie_norms false", not model.tie_norms),
        ("model.num_unique_layers null", model.num_unique_layers in (None, model.num_layers)),
        ("model.soft_prompt_tokens 0", not model.soft_prompt_tokens),
    ]


def _unmet(*needs: tuple[str, bool]) -> list[str]:
    return [text for text, met in needs if not met]


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _renamed(pairs: Sequence[tuple[str, str]], kinds: Sequence[str]) -> list[Row]:
    return [Row((f"{ours}.{kind}",), (f"{theirs}.{kind}",)) for ours, theirs in pairs for kind in kinds]


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
        rows += _renamed(norms + mlp, _kinds(True)) + _renamed(attention, _kinds(model.attention_bias))
    rows += _renamed([("final_norm", "gpt_neox.final_layer_norm")], _kinds(True))
    if not model.tie_embeddings:
        rows.append(Row(("head.weight",), ("embed_out.weight",)))
    return rows


def _neox_obstacles(model: ModelConfig) -> list[str]:
    return _unmet(
        ("model.norm layernorm", model.norm == "layernorm"),
        (f"model.activation one of {', '.join(_ACTIVATIONS)}", model.activation in _ACTIVATIONS),
        ("model.mlp_bias true", model.mlp_bias),
        (
            "model.num_kv_heads null (as many key/value heads as query heads)",
            model.kv_heads == model.num_attention_heads,
        ),
        (
            "model.head_dim null (heads that make up hidden_size)",
            model.head_size * model.num_attention_heads == model.hidden_size,
        ),
        *_common_needs(model),
    )


def _neox_settings(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_act": _ACTIVATIONS[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.residual == "parallel",
        "rotary_pct": model.rotary_fraction,
        "rotary_emb_base": model.rotary_base,
    }


def _neox_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    base, fraction = _rope(config, "rotary_emb_base", "rotary_pct", 0.25)
    return {
        "norm": "layernorm",
        "norm_epsilon": float(config.get("layer_norm_eps", 1e-5)),
        "activation": _activation(config.get("hidden_act", "gelu"), _ACTIVATIONS),
        "rotary_base": base,
        "rotary_fraction": fraction,
        "residual": "parallel" if config.get("use_parallel_residual", True) else "sequential",
        "attention_bias": bool(config.get("attention_bias", True)),
        "mlp_bias": True,
    }


# --- Llama -----------------------------------------------------------------------------------------


def _llama_rows(model: ModelConfig) -> list[Row]:
    heads, kv_heads, size = model.num_attention_heads, model.kv_heads, model.head_size

    def split(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return split_qkv(tensors[0], heads, kv_heads, size)

    def join(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [join_qkv(tensors[0], tensors[1], tensors[2], kv_heads, size)]

    rows = [Row(("embedding.weight",), ("model.embed_tokens.weight",))]
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        norms = [
            (f"{ours}.attention_norm", f"{theirs}.input_layernorm"),
            (f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm"),
        ]
        mlp = [(f"{ours}.mlp.{part}", f"{theirs}.mlp.{part}_proj") for part in ("gate", "up", "down")]
        rows += _renamed(norms, _kinds(False)) + _renamed(mlp, _kinds(model.mlp_bias))
        for kind in _kinds(model.attention_bias):
            separate = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            rows.append(Row((f"{ours}.attention.qkv.{kind}",), separate, split, join))
            rows.append(Row((f"{ours}.attention.out.{kind}",), (f"{theirs}.self_attn.o_proj.{kind}",)))
    rows += _renamed([("final_norm", "model.norm")], _kinds(False))
    if not model.tie_embeddings:
        rows.append(Row(("head.weight",), ("lm_head.weight",)))
    return rows


def _llama_obstacles(model: ModelConfig) -> list[str]:
    return _unmet(
        ("model.norm rmsnorm", model.norm == "rmsnorm"),
        (f"model.activation one of {', '.join(_GATED_ACTIVATIONS)}", model.activation in _GATED_ACTIVATIONS),
        ("model.rotary_fraction 1", model.rotary_fraction == 1),
        ("model.residual sequential", model.residual == "sequential"),
        (
            "model.hidden_size a multiple of model.num_attention_heads",
            model.hidden_size % model.num_attention_heads == 0,
        ),
        *_common_needs(model),
    )


def _llama_settings(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_act": _GATED_ACTIVATIONS[model.activation],
        "rms_norm_eps": model.norm_epsilon,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "mlp_bias": model.mlp_bias,
        "rope_theta": model.rotary_base,
    }


def _llama_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    base, fraction = _rope(config, "rope_theta", "partial_rotary_factor", 1.0)
    if config.get("pretraining_tp") not in (None, 1):
        raise UserError(f"pretraining_tp: {config['pretraining_tp']} is not supported: only 1 is")
    return {
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "norm": "rmsnorm",
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "activation": _activation(config.get("hidden_act", "silu"), _GATED_ACTIVATIONS),
        "rotary_base": base,
        "rotary_fraction": fraction,
        "residual": "sequential",
        "attention_bias": bool(config.get("attention_bias", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


def _activation(name: str, known: Mapping[str, str]) -> str:
    for ours, theirs in known.items():
        if theirs == _SYNONYMS.get(name, name):
            return ours
    raise UserError(f"hidden_act: '{name}' cannot be imported: known are {', '.join(sorted(known.values()))}")


def _rope(config: Mapping[str, Any], base_key: str, fraction_key: str, fraction: float) -> tuple[float, float]:
    """Rotary base and fraction, from transformers 5's `rope_parameters` or the names before it."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise UserError(f"rope_type: '{kind}' cannot be imported: only unscaled rotary positions are known")
    base = parameters.get("rope_theta", config.get(base_key, 10000.0))
    share = parameters.get("partial_rotary_factor", config.get(fraction_key, fraction))
    return float(base), float(share)


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            ("embed_out.weight", "lm_head.weight"),
            _neox_rows,
            _neox_obstacles,
            _neox_settings,
            _neox_fields,
        ),
        Architecture(
            "llama",
            "LlamaForCausalLM",
            ("lm_head.weight",),
            _llama_rows,
            _llama_obstacles,
            _llama_settings,
            _llama_fields,
        ),
    )
}
