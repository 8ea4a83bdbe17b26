"""What the classes of transformers have in common: needs, names of activations, rotary settings, rows.

A class is described by data: which values of our model section it can compute (`Needs`), which of its
tensors are ours (rows), and its part of config.json. Whatever is not said is as in `PLAIN`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from castalia.config import ModelConfig
from castalia.config.mup import factors_at_work
from castalia.convert.table import Row, join_qkv, split_qkv
from castalia.errors import UserError

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
}
# The gate's function; `glu` is the sigmoid's, `bilinear` has none.
GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "linear"}
# Other names that transformers has for the same function.
_SYNONYMS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "swish": "silu"}

Needs = Mapping[str, Any]
"""Field of the model section -> the one value that a class computes; a tuple: one of these; ANY: all."""


class _Any:
    """Every value."""


ANY = _Any()

PLAIN: dict[str, Any] = {
    "block": "transformer",
    "position": "rotary",
    "stable_embedding": "none",
    "rotary_scaling": "none",
    "norm_placement": "pre",
    "qk_norm": False,
    "tie_norms": False,
    "residual": "sequential",
    "rotary_fraction": 1,
    "head_bias": False,
    "tie_embeddings": ANY,
    "attention_bias": ANY,
    "attention_out_bias": True,
    "mlp_bias": ANY,
    "soft_prompt_tokens": 0,
    "moe_num_experts": 0,
    "attention": "global",
}


@dataclass(frozen=True)
class Architecture:
    """One class of transformers.

    Attributes:
        model_type, class_name: as config.json names it.
        heads: their names of the output matrix (the first is the one in files; transformers 5 has another one
            in memory). A tied model has none.
        rows: the table.
        needs: what differs from PLAIN.
        further: needs that are no single field's, as (sentence, whether it is met).
        settings: its config.json, but for what all have.
        fields: our model section from it.
    """

    model_type: str
    class_name: str
    heads: tuple[str, ...]
    rows: Callable[[ModelConfig], list[Row]]
    needs: Needs
    further: Callable[[ModelConfig], list[tuple[str, bool]]]
    settings: Callable[[ModelConfig], dict[str, Any]]
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]

    def obstacles(self, model: ModelConfig) -> list[str]:
        """What of a configuration it cannot express, as sentences."""
        found = [
            (f"model.{field} {_said(value)}", _value(model, field) in (value if isinstance(value, tuple) else (value,)))
            for field, value in (PLAIN | dict(self.needs)).items()
            if value is not ANY
        ]
        factor = factors_at_work(model)
        if factor is not None:
            found.append((f"model.{factor} {'false' if factor == 'mup' else 1}", False))
        shared = ("model.num_unique_layers null", model.num_unique_layers in (None, model.num_layers))
        return [text for text, met in (*found, shared, *self.further(model)) if not met]


def _value(model: ModelConfig, field: str) -> Any:
    if field == "attention":  # a list may say of all layers what a word says
        kinds = set(model.attention_kinds)
        return kinds.pop() if len(kinds) == 1 else model.attention
    if field == "attention_out_bias":  # of no consequence where there are no biases at all
        return model.attention_out_bias or not model.attention_bias
    if field == "moe_num_experts":
        return min(model.moe_num_experts, 1)
    return getattr(model, field)


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return " or ".join(_said(v) for v in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def kinds(bias: bool) -> tuple[str, ...]:
    """The tensors of a linear map."""
    return ("weight", "bias") if bias else ("weight",)


def renamed(pairs: Sequence[tuple[str, str]], kinds: Sequence[str]) -> list[Row]:
    """Rows that only rename."""
    return [Row((f"{ours}.{kind}",), (f"{theirs}.{kind}",)) for ours, theirs in pairs for kind in kinds]


def separate_qkv(model: ModelConfig) -> tuple[Callable[..., Sequence[Tensor]], Callable[..., Sequence[Tensor]]]:
    """Transforms of one qkv into three and back."""
    heads, kv_heads, size = model.num_attention_heads, model.kv_heads, model.head_size
    return (
        lambda t: split_qkv(t[0], heads, kv_heads, size),
        lambda t: [join_qkv(t[0], t[1], t[2], kv_heads, size)],
    )


def head_row(model: ModelConfig, theirs: str = "lm_head") -> list[Row]:
    """The output matrix, of an untied model."""
    return [] if model.tie_embeddings else renamed([("head", theirs)], kinds(model.head_bias))


def whole_heads(model: ModelConfig) -> list[tuple[str, bool]]:
    """What classes need that know neither grouped heads nor heads of their own size."""
    return [
        (
            "model.num_kv_heads null (as many key/value heads as query heads)",
            model.kv_heads == model.num_attention_heads,
        ),
        (
            "model.head_dim null (heads that make up hidden_size)",
            model.head_size * model.num_attention_heads == model.hidden_size,
        ),
    ]


def one_of(model: ModelConfig, known: Mapping[str, str]) -> tuple[str, bool]:
    """The need of an activation that has a name there."""
    return f"model.activation one of {', '.join(known)}", model.activation in known


def activation(name: str, known: Mapping[str, str]) -> str:
    """Our name of an activation of theirs."""
    for ours, theirs in known.items():
        if theirs == _SYNONYMS.get(name, name):
            return ours
    raise UserError(f"hidden_act: '{name}' cannot be imported: known are {', '.join(sorted(known.values()))}")


def rope_settings(model: ModelConfig) -> dict[str, Any]:
    """`rope_parameters`, as since transformers 5."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rotary_fraction != 1:
        rope["partial_rotary_factor"] = model.rotary_fraction
    if model.rotary_scaling == "none":
        return rope
    low, high = model.rotary_turns
    rope |= {"rope_type": model.rotary_scaling, "factor": model.rotary_scaling_factor}
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
    if model.rotary_scaling in names:
        rope |= dict(zip(names[model.rotary_scaling], (low, high), strict=True))
        rope["original_max_position_embeddings"] = model.rotary_original_length
    return rope


def rope_fields(
    config: Mapping[str, Any], base_key: str = "rope_theta", fraction_key: str = "", fraction: float = 1.0
) -> dict[str, Any]:
    """Rotary fields, from transformers 5's `rope_parameters` or the names before it."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = said.get("rope_type", said.get("type", "default"))
    fields: dict[str, Any] = {
        "rotary_base": float(said.get("rope_theta", config.get(base_key, 10000.0))),
        "rotary_fraction": float(said.get("partial_rotary_factor", config.get(fraction_key, fraction))),
    }
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(f"rope_type: '{kind}' cannot be imported: known are default, linear, llama3 and yarn")
    other = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if said.get(key) is not None]
    if other or said.get("truncate") is False:
        raise UserError(f"{(other or ['truncate'])[0]}: cannot be imported: only YaRN's own values are known")
    fields |= {"rotary_scaling": kind, "rotary_scaling_factor": float(said["factor"])}
    if kind != "linear":
        length = said.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
        fields |= {
            "rotary_original_length": length,
            "rotary_scaling_low": None if said.get(low) is None else float(said[low]),
            "rotary_scaling_high": None if said.get(high) is None else float(said[high]),
        }
    return fields
