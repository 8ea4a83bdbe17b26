"""muP as arithmetic: how each weight starts, learns and counts at a width, relative to a base width.

    base width h0 ──tuned there──> lr, init, multipliers ──these rules──> the same choices serve width h
    m = h / h0 (inner: f / f0, heads: d / d0)

    weights                        initial std    Adam's lr   SGD's lr     in the forward pass
    hidden (in and out grow)       1 / sqrt(m)    1 / m       out / in     -
    input, vectors (out grows)     constant       1           m            -
    output matrix (in grows)       constant       1           m            hidden states / m
    router of experts (in grows)   1 / m          1 / m       1 / m        -
    attention                      -              -           -            sqrt(d0) / d in place of 1 / sqrt(d)

Decoupled weight decay stays what lr x weight_decay says. Yang et al. 2022 (Tensor Programs V, table 8; the
router by table 3, which is the same function). At the base width every factor is 1. Names alone decide,
so a rank that holds a part of a matrix knows its rule. No torch: model and optimizer both read this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from castalia.config.section import Section, setting

if TYPE_CHECKING:
    from castalia.config.schema_model import ModelConfig

Family = Literal["adam", "sgd"]
"""Optimizers by how an update grows with the gradient: not at all, or in proportion."""


class MupSettings(Section):
    """The part of the `model` section that says how its function follows its width."""

    mup: bool = setting(
        False, "scale initial weights, learning rates, attention and logits by the width, as muP does (docs/mup.md)"
    )
    mup_base_hidden_size: int | None = setting(None, "muP: the hidden_size at which everything is as without muP", ge=1)
    mup_base_intermediate_size: int | None = setting(
        None, "muP: the intermediate_size there; null: in the ratio of the hidden sizes", ge=1
    )
    mup_base_head_dim: int | None = setting(
        None, "muP: the head_dim there; null: in the ratio of the hidden sizes, so with as many heads", ge=1
    )
    mup_init_scale: float = setting(1.0, "times the initial value of every matrix that init_method draws", gt=0)
    mup_attn_temp: float = setting(1.0, "attention scores are divided by this", gt=0)
    mup_output_temp: float = setting(1.0, "what the output matrix makes of hidden states is divided by this", gt=0)
    mup_embedding_mult: float = setting(1.0, "times the embeddings of tokens", gt=0)
    mup_rp_embedding_mult: float = setting(
        1.0, "times what positions add: learned or sinusoidal vectors, or rpe's biases", gt=0
    )


class Ratios(NamedTuple):
    """Widths over base widths; 1 where muP is off."""

    hidden: float = 1.0
    inner: float = 1.0
    head: float = 1.0
    heads: float = 1.0
    fixed: float = 1.0


# What follows `layers.N.` (or stands alone): ratios of outputs and inputs. The first that fits counts.
_RULES: tuple[tuple[str, str, str], ...] = (
    ("relative_bias.weight", "heads", "fixed"),
    ("embedding.weight", "hidden", "fixed"),
    ("soft_prompt.weight", "hidden", "fixed"),
    ("head.weight", "fixed", "hidden"),
    ("head.bias", "fixed", "fixed"),
    ("router.weight", "fixed", "hidden"),
    ("router.bias", "fixed", "fixed"),
    ("join.weight", "hidden", "hidden"),
    ("gate.spatial.weight", "fixed", "fixed"),
    ("gate.spatial.bias", "fixed", "fixed"),
    ("gate.norm.weight", "inner", "fixed"),
    ("gate.norm.bias", "inner", "fixed"),
    ("q_norm.weight", "head", "fixed"),
    ("q_norm.bias", "head", "fixed"),
    ("k_norm.weight", "head", "fixed"),
    ("k_norm.bias", "head", "fixed"),
    ("norm.weight", "hidden", "fixed"),
    ("norm.bias", "hidden", "fixed"),
    ("attention.qkv.weight", "hidden", "hidden"),
    ("attention.qkv.bias", "hidden", "fixed"),
    ("attention.out.weight", "hidden", "hidden"),
    ("attention.out.bias", "hidden", "fixed"),
    ("up.weight", "inner", "hidden"),
    ("up.bias", "inner", "fixed"),
    ("gate.weight", "inner", "hidden"),
    ("gate.bias", "inner", "fixed"),
    ("down.weight", "hidden", "inner"),
    ("down.bias", "hidden", "fixed"),
)


def ratios(cfg: ModelConfig) -> Ratios:
    """How much wider than the base the model is."""
    base = cfg.mup_base_hidden_size
    if not cfg.mup or base is None:
        return Ratios()
    hidden = cfg.hidden_size / base
    inner = hidden if cfg.mup_base_intermediate_size is None else cfg.mlp_size / cfg.mup_base_intermediate_size
    head = hidden if cfg.mup_base_head_dim is None else cfg.head_size / cfg.mup_base_head_dim
    return Ratios(hidden, inner, head, hidden / head)


def widths(name: str, cfg: ModelConfig) -> tuple[float, float]:
    """Ratios of a parameter's outputs and inputs; what does not grow with the width has 1.

    Raises:
        ValueError: no rule knows the parameter.
    """
    scale = ratios(cfg)
    for suffix, outputs, inputs in _RULES:
        if name.endswith(suffix):
            if outputs == "head" and cfg.qk_norm != "head":
                outputs = "hidden"
            return getattr(scale, outputs), getattr(scale, inputs)
    raise ValueError(f"muP has no rule for the parameter {name}")


def matrix_like(name: str) -> bool:
    """Whether both sides of a parameter grow with the width."""
    return any(name.endswith(suffix) and "fixed" not in sides for suffix, *sides in _RULES)


def base_sides(name: str, shape: Sequence[int], cfg: ModelConfig) -> tuple[float, float]:
    """Rows and columns of the base model's matrix; a table that is looked up has its outputs as columns."""
    outputs, inputs = widths(name, cfg)
    if name.endswith(("embedding.weight", "relative_bias.weight")):
        outputs, inputs = inputs, outputs
    return shape[-2] / outputs, shape[-1] / inputs


def initial_factor(name: str, cfg: ModelConfig) -> float:
    """The initial std over that of the base model's parameter."""
    if not cfg.mup:
        return 1.0
    inputs = widths(name, cfg)[1]
    if name.endswith("router.weight"):
        return 1 / inputs
    return 1 / math.sqrt(inputs) if matrix_like(name) else 1.0


def rate_factor(name: str, cfg: ModelConfig, family: Family) -> float:
    """The learning rate over the configured one."""
    if not cfg.mup:
        return 1.0
    outputs, inputs = widths(name, cfg)
    if name.endswith("router.weight"):
        return 1 / inputs
    if matrix_like(name):
        return 1 / inputs if family == "adam" else outputs / inputs
    return 1.0 if family == "adam" else outputs * inputs


def decay_factor(rate: float) -> float:
    """Weight decay over the configured one where the learning rate is `rate` times: their product stays."""
    return 1 / rate


def attention_scale(cfg: ModelConfig) -> float | None:
    """What q k is multiplied by; None: 1 / sqrt(d)."""
    head = ratios(cfg).head
    if head == 1 and cfg.mup_attn_temp == 1:
        return None
    return math.sqrt(base_head_size(cfg)) / (cfg.head_size * cfg.mup_attn_temp)


def base_head_size(cfg: ModelConfig) -> float:
    """d0, the head size of the base model, by whose root relative biases are scaled."""
    return cfg.head_size / ratios(cfg).head


def output_factor(cfg: ModelConfig) -> float:
    """What hidden states are multiplied by before the output matrix."""
    return 1 / (ratios(cfg).hidden * cfg.mup_output_temp)


def factors_at_work(cfg: ModelConfig) -> str | None:
    """A setting by which the forward pass differs from that of the same weights without it; None: there is none."""
    said = ("mup_attn_temp", "mup_output_temp", "mup_embedding_mult", "mup_rp_embedding_mult")
    given = next((name for name in said if getattr(cfg, name) != 1), None)
    return given if given or ratios(cfg) == Ratios() else "mup"


def at_base(cfg: ModelConfig) -> ModelConfig:
    """The configuration by which initial standard deviations are reckoned."""
    return cfg.model_copy(update={"hidden_size": cfg.mup_base_hidden_size}) if cfg.mup else cfg


def check_mup(cfg: ModelConfig) -> None:
    """Refuse what makes no sense together, or has no known rule.

    Raises:
        ValueError: it does not.
    """
    bases = ("mup_base_hidden_size", "mup_base_intermediate_size", "mup_base_head_dim")
    if not cfg.mup:
        given = next((name for name in bases if getattr(cfg, name) is not None), None)
        if given is not None:
            raise ValueError(f"model.{given} is for muP: set model.mup to true, or leave it out")
        return
    if cfg.mup_base_hidden_size is None:
        raise ValueError("model.mup needs model.mup_base_hidden_size, the width at which the run was tuned: give it")
    if cfg.block != "transformer":
        raise ValueError(
            f"model.mup: the parameters of model.block '{cfg.block}' have no known rule: leave model.mup false"
        )
    if "amlp" in cfg.attention_kinds:
        raise ValueError("model.mup: the small attention of amlp layers does not grow with the width: use gmlp")
    if cfg.norm == "scalenorm":
        raise ValueError("model.mup: model.norm scalenorm makes entries smaller the more there are: use rmsnorm")
    for key in ("init_method", "output_init_method"):
        if "orthogonal" in getattr(cfg, key):
            raise ValueError(f"model.mup: model.{key} '{getattr(cfg, key)}' has no known rule: use normal")
