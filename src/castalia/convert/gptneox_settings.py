"""The model of a GPT-NeoX configuration, alone; and the keys by which GPT-NeoX builds one of our models.

What is written is translated back before it is used, so that a model that GPT-NeoX cannot build, or that a
release lacks, is refused by name instead of becoming another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from castalia.config import ModelConfig
from castalia.config.gptneox_given import Given
from castalia.config.gptneox_model import MODEL_RULES
from castalia.config.gptneox_rules import RENAMED, REQUIRED
from castalia.config.load import check_values, read_gptneox
from castalia.config.yaml12 import Origin
from castalia.errors import UserError

Layout = Literal["v1.0", "v2.0", "main"]

_NORMS = {"layernorm": "layernorm_epsilon", "rmsnorm": "rms_norm_epsilon", "scalenorm": "scalenorm_epsilon"}


def read_settings(files: Sequence[Path], old: bool) -> Given:
    """GPT-NeoX's files as their values; `old`: the checkpoint has v2.0's names, whose defaults count then."""
    given = read_gptneox(files)
    given.compat = "v2.0" if old else given.compat
    return given


def model_of(given: Given, where: str) -> ModelConfig:
    """The model alone, whatever else the values ask for.

    Raises:
        UserError: the model is one that cannot be built here.
    """
    values: dict[str, Any] = {}
    for key, ours in REQUIRED.items():
        if ours.startswith("model."):
            values[ours] = given.required(key)
    for key, ours in RENAMED.items():
        if ours.startswith("model.") and given[key] is not None:
            values[ours] = given[key]
    for rule in MODEL_RULES:
        value = rule.value(given) if rule.ours.startswith("model.") else None
        if value is not None:
            values[rule.ours] = value
    model = {name.removeprefix("model."): value for name, value in values.items()}
    # A model is checked together with the length that it is trained at.
    return check_values({"model": model, "data": {"seq_length": given.required("seq_length")}}, where).model


def settings_of(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The keys of our model.

    Raises:
        UserError: GPT-NeoX, or this release of it, has no such model.
    """
    old = layout != "main"
    if old:
        _check_old(model, layout)
    kinds = ["global" if kind == "window" else kind for kind in model.attention_kinds]
    positions = model.max_position_embeddings or 2048
    keys: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "seq_length": positions,
        "max_position_embeddings": positions,
        "norm": "rmsnorm" if model.norm == "rmsnorm_eps_outside" else model.norm,
        "pos_emb": model.position,
        "activation": "gelu" if model.activation == "gelu_tanh" else model.activation,
        "bias_gelu_fusion": model.activation == "gelu_tanh",
        "gpt_j_residual": model.residual == "parallel",
        "gpt_j_tied": model.tie_norms,
        "no_weight_tying": not model.tie_embeddings,
        "attention_config": [[[kind], 1] for kind in kinds] if set(kinds) != {"global"} else [[["global"], "all"]],
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "output_layer_parallelism": "column",
    }
    if keys["norm"] in _NORMS:
        keys[_NORMS[keys["norm"]]] = model.norm_epsilon
    if model.position == "rotary":
        keys |= {"rotary_pct": model.rotary_fraction, "rotary_emb_base": model.rotary_base}
    if model.stable_embedding == "positions":
        keys["use_bnb_optimizer"] = True
    if model.position == "learned" and model.position_offset:
        keys["opt_pos_emb_offset"] = model.position_offset
    if model.position == "rpe":
        keys |= {"rpe_num_buckets": model.rpe_num_buckets, "rpe_max_distance": model.rpe_max_distance}
    if not old:
        keys |= {
            "use_bias_in_attn_linear": model.attention_bias,
            "use_bias_in_mlp": model.mlp_bias,
            "use_qk_layernorm": bool(model.qk_norm),
            # Of a gated MLP main takes a third of this as the inner width.
            "intermediate_size": model.mlp_size * (3 if model.gated else 1),
        }
        if model.kv_heads != model.num_attention_heads:
            keys["num_kv_heads"] = model.kv_heads
        if "window" in model.attention_kinds and model.attention_window is not None:
            keys["sliding_window_width"] = model.attention_window - 1
    origins = {key: Origin("the keys for GPT-NeoX") for key in keys}
    back = model_of(Given(dict(keys), origins, "v2.0" if old else "main"), "the keys for GPT-NeoX")
    for name, mine in _function(model).items():
        if _function(back)[name] != mine:
            raise UserError(f"model.{name}: is {mine}, which GPT-NeoX {layout} has no key for: it cannot go there")
    return keys


def _check_old(model: ModelConfig, layout: Layout) -> None:
    width = int(8 / 3 * model.hidden_size) if model.gated else 4 * model.hidden_size
    for name, value, there in (
        ("num_kv_heads", model.kv_heads, model.num_attention_heads),
        ("qk_norm", model.qk_norm, False),
        ("attention_bias", model.attention_bias, True),
        ("mlp_bias", model.mlp_bias, True),
        ("intermediate_size", model.mlp_size, width),
        ("activation", model.activation, "geglu" if model.gated else model.activation),
        ("norm", model.norm, "rmsnorm_eps_outside" if model.norm == "rmsnorm" else model.norm),
        ("attention", "window" in model.attention_kinds, False),
    ):
        if value != there:
            raise UserError(
                f"model.{name}: is {value}, and GPT-NeoX {layout} has it as {there} alone: write --layout main"
            )


def _function(model: ModelConfig) -> dict[str, Any]:
    """What decides which function a model is, with defaults filled in."""
    found: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_kv_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.mlp_size,
        "attention": tuple(model.attention_kinds),
    }
    names = ["block", "norm", "activation", "position", "residual", "attention_bias", "mlp_bias", "tie_embeddings"]
    names += ["qk_norm", "tie_norms", "mup", "hidden_dropout", "attention_dropout", "norm_placement"]
    names += ["stable_embedding"]
    if model.norm != "non_parametric_layernorm":
        names.append("norm_epsilon")
    if model.position == "rotary":
        names += ["rotary_fraction", "rotary_base"]
    names += ["position_offset"] if model.position == "learned" else []
    names += ["rpe_num_buckets", "rpe_max_distance"] if model.position == "rpe" else []
    names += ["attention_window"] if "window" in model.attention_kinds else []
    return found | {name: getattr(model, name) for name in names}
