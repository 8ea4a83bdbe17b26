"""The `model` section: the function that is trained, and which settings of it make no sense together.

The fields come first, then what follows from them, then the checks. Like the rest of the schema it
imports no torch: planning and checking a run must be instant.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from castalia.config.attention import AttentionSettings, check_attention, layer_kinds
from castalia.config.mup import MupSettings, check_mup
from castalia.config.section import setting

MOST_LAYERS = 10_000  # more is a slip of the hand, and would take minutes to count


class ModelConfig(MupSettings, AttentionSettings):
    """The function that is trained."""

    block: str = setting("transformer", "the layer: a registered name, module:attribute or file.py:attribute")
    num_layers: int = setting(6, "layers", ge=1)
    hidden_size: int = setting(256, "width of the residual stream", ge=1)
    num_attention_heads: int = setting(8, "query heads", ge=1)
    num_kv_heads: int | None = setting(
        None, "key/value heads (grouped-query attention); null: one per query head", ge=1
    )
    head_dim: int | None = setting(None, "size of a head; null: hidden_size / num_attention_heads", ge=1)
    intermediate_size: int | None = setting(
        None, "inner width of the MLP; null: 4 x hidden, or 8/3 x hidden rounded up to 64 when gated", ge=1
    )
    vocab_size: int | None = setting(
        None,
        "rows of the embedding, padding included; null: the tokenizer's, rounded up to vocab_multiple",
        ge=1,
    )
    vocab_multiple: int = setting(128, "the vocabulary is padded to a multiple of this", ge=1)
    max_position_embeddings: int | None = setting(
        None, "longest sequence the model accepts; null: data.seq_length", ge=1
    )
    norm: str = setting(
        "layernorm",
        "layernorm, rmsnorm, rmsnorm_eps_outside (GPT-NeoX v2.0's), scalenorm, "
        "non_parametric_layernorm, or a registered name",
    )
    norm_epsilon: float = setting(1e-5, "keeps the norm from dividing by zero", gt=0)
    norm_placement: Literal["pre", "post"] = setting(
        "pre", "pre: norms of what enters a branch; post: of what a branch adds to the residual stream (OLMo 2)"
    )
    qk_norm: bool | Literal["head", "full"] = setting(
        False,
        "normalise queries and keys before positions enter; true: one gain per head and dimension for both "
        "(GPT-NeoX's); head: each head alone, gains shared by the heads (Qwen 3); full: all heads together (OLMo 2)",
    )
    tie_norms: bool = setting(
        False, "parallel residual only: the MLP reads the attention's normed input, mlp_norm is left out"
    )
    activation: str = setting(
        "gelu",
        "gelu, gelu_tanh, relu, silu (or swish), mish, softsign; "
        "gated: swiglu, geglu, reglu, bilinear, glu; or a registered name",
    )
    position: Literal["rotary", "learned", "sinusoidal", "rpe", "alibi", "none"] = setting(
        "rotary", "how positions enter; rpe is T5's relative bias, shared by all layers"
    )
    position_offset: int = setting(
        0, "learned only: added to positions; the table keeps max_position_embeddings rows", ge=0
    )
    stable_embedding: Literal["none", "tokens", "positions", "both"] = setting(
        "none", "a layer norm behind the tables of tokens or learned positions, drawn by xavier_uniform, for 8-bit Adam"
    )
    rotary_fraction: float = setting(1.0, "share of each head that is rotated", gt=0, le=1)
    rotary_base: float = setting(10000.0, "base of the rotary frequencies", gt=0)
    rotary_scaling: Literal["none", "linear", "llama3", "yarn"] = setting(
        "none", "how rotary frequencies are lowered for longer sequences than the model was first trained on"
    )
    rotary_scaling_factor: float = setting(1.0, "by how much at most they are lowered", ge=1)
    rotary_original_length: int | None = setting(
        None, "llama3 and yarn: the length that the model was first trained on", unit="tokens", ge=1
    )
    rotary_scaling_low: float | None = setting(
        None, "frequencies of fewer turns in that length are lowered in full; null: 1", "numerics", "turns", gt=0
    )
    rotary_scaling_high: float | None = setting(
        None, "frequencies of more turns stay; null: 4 for llama3, 32 for yarn", "numerics", "turns", gt=0
    )
    rpe_num_buckets: int = setting(32, "rpe only: how many classes of distance have a bias of their own", ge=4)
    rpe_max_distance: int = setting(128, "rpe only: distances from here on share the last bucket", unit="tokens", ge=2)
    residual: Literal["parallel", "sequential"] = setting(
        "sequential",
        "parallel: x + attention(n1(x)) + mlp(n2(x)); sequential: the MLP sees the attention's output",
    )
    attention_bias: bool = setting(True, "biases on the attention's two projections")
    attention_out_bias: bool = setting(True, "where attention_bias: on the output projection too, not on qkv alone")
    mlp_bias: bool = setting(True, "biases on the MLP's projections")
    hidden_dropout: float = setting(0.0, "share dropped of the embedding and of both branches of a layer", ge=0, lt=1)
    attention_dropout: float = setting(0.0, "share dropped of the attention's probabilities", ge=0, lt=1)
    tie_embeddings: bool = setting(False, "the output matrix is the embedding matrix")
    head_bias: bool = setting(False, "the output matrix has a bias (GPT-J)")
    moe_num_experts: int = setting(0, "experts in place of an MLP; 0: plain MLPs", unit="experts", ge=0)
    moe_top_k: int = setting(2, "experts per token", unit="experts", ge=1)
    moe_first_layer: int = setting(0, "the first layer with experts", ge=0)
    moe_interval: int = setting(1, "from there on, every so many layers have experts", "numerics", "layers", ge=1)
    moe_intermediate_size: int | None = setting(None, "inner width of an expert; null: intermediate_size", ge=1)
    moe_shared_experts: int = setting(
        0, "experts that every token passes besides, held as one MLP so many times as wide", unit="experts", ge=0
    )
    moe_router: Literal["topk", "sinkhorn"] = setting(
        "topk", "how experts are chosen; sinkhorn balances each micro-batch in training, and is topk otherwise"
    )
    moe_score: Literal["softmax", "sigmoid"] = setting("softmax", "the router's logits to weights of experts")
    moe_normalise: bool = setting(True, "the weights of a token's chosen experts are divided by their sum")
    moe_jitter: float = setting(
        0.0, "in training the router's input is multiplied by numbers between 1 - this and 1 + this", ge=0, lt=1
    )
    moe_bias_rate: float = setting(
        0.0,
        "balancing without a loss: after each step, biases that only choose experts move by this, up for experts "
        "with fewer tokens than the mean; 0: there are no such biases",
        ge=0,
    )
    mtp_depth: int = setting(
        0, "modules that predict further tokens ahead in training (DeepSeek-V3's); generation leaves them out", ge=0
    )
    num_unique_layers: int | None = setting(None, "layers with weights of their own; null: all of num_layers", ge=1)
    param_sharing_style: Literal["grouped", "spaced"] = setting(
        "grouped", "order of 2 unique layers in 4: grouped 1 2 1 2, spaced 1 1 2 2"
    )
    soft_prompt_tokens: int = setting(
        0,
        "trainable vectors in front of every sequence, all other weights frozen; 0: none",
        unit="tokens",
        ge=0,
    )
    soft_prompt_range: float = setting(0.5, "their initial values are uniform between minus and plus this", gt=0)
    soft_prompt_text: str | None = setting(
        None, "they begin as the embeddings of this text instead, repeated or cut to their number", min_length=1
    )
    init_method: str = setting(
        "small_init",
        "initial weights: normal, scaled_normal, single_residual_scaled_normal, small_init, wang_init, "
        "xavier_uniform, xavier_normal, orthogonal, scaled_orthogonal",
    )
    output_init_method: str = setting("wang_init", "the same for the two projections that write to the residual stream")
    init_std: float = setting(0.02, "standard deviation for `normal` and the two `scaled_normal`", gt=0)

    @property
    def kv_heads(self) -> int:
        """Key/value heads, null resolved."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Size of a head, null resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies by a gate (GLU variants, Shazeer 2020): `bilinear`, and what ends in `glu`."""
        return self.activation.endswith("glu") or self.activation == "bilinear"

    @property
    def mlp_size(self) -> int:
        """Inner width of the MLP, null resolved."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64 if self.gated else 4 * self.hidden_size

    @property
    def normed_embeddings(self) -> tuple[str, ...]:
        """Names of the tables with a norm behind them."""
        tables = {"tokens": ("embedding",), "positions": ("position_embedding",)}
        both = (*tables["tokens"], *tables["positions"])
        return tables.get(self.stable_embedding, both if self.stable_embedding == "both" else ())

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated (always even)."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def expert_size(self) -> int:
        """Inner width of an expert, null resolved."""
        return self.moe_intermediate_size or self.mlp_size

    def has_experts(self, layer: int) -> bool:
        """Whether the layer `layer` of the state dict has experts in place of an MLP."""
        after = layer - self.moe_first_layer
        return self.moe_num_experts > 0 and after >= 0 and after % self.moe_interval == 0

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """The kind of each layer that is executed."""
        return layer_kinds(self.attention, self.num_layers)

    @property
    def layer_order(self) -> tuple[int, ...]:
        """For each layer that is executed, which layer of the state dict it is."""
        unique = self.num_unique_layers or self.num_layers
        if self.param_sharing_style == "grouped":
            return tuple(i % unique for i in range(self.num_layers))
        return tuple(i // (self.num_layers // unique) for i in range(self.num_layers))

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} does not divide by model.num_attention_heads "
                f"{self.num_attention_heads}: change one, or give model.head_dim"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"model.num_attention_heads {self.num_attention_heads} does not divide by "
                f"model.num_kv_heads {self.kv_heads}"
            )
        if self.position == "rotary" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(
                f"model.rotary_fraction {self.rotary_fraction} of a head of {self.head_size} rotates "
                f"{self.rotary_dim} dimensions; it must be an even number, at least 2"
            )
        if self.qk_norm is True and self.num_attention_heads != self.kv_heads:
            raise ValueError(
                "model.qk_norm has one gain per query head, shared by the keys: it needs as many key/value heads; "
                "leave model.num_kv_heads out, or choose head or full"
            )
        return self

    @model_validator(mode="after")
    def _positions(self) -> ModelConfig:
        rows = self.max_position_embeddings
        if self.position_offset and self.position != "learned":
            raise ValueError("model.position_offset is for model.position learned: set it to 0")
        if rows is not None and self.position_offset >= rows:
            raise ValueError(
                f"model.position_offset {self.position_offset} is beyond the {rows} rows of "
                "model.max_position_embeddings: raise that"
            )
        if self.stable_embedding in ("positions", "both") and self.position != "learned":
            raise ValueError(
                f"model.stable_embedding {self.stable_embedding} needs model.position learned: choose tokens or none"
            )
        if self.position == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"model.position sinusoidal needs an even model.hidden_size, not {self.hidden_size}")
        if self.position == "rpe" and self.rpe_max_distance <= self.rpe_num_buckets // 2:
            raise ValueError(
                f"model.rpe_max_distance {self.rpe_max_distance} must be above half of model.rpe_num_buckets "
                f"{self.rpe_num_buckets}"
            )
        return self

    @model_validator(mode="after")
    def _scaling(self) -> ModelConfig:
        kind = self.rotary_scaling
        bounds = (self.rotary_original_length, self.rotary_scaling_low, self.rotary_scaling_high)
        if kind != "none" and self.position != "rotary":
            raise ValueError(f"model.rotary_scaling {kind} is for model.position rotary: leave it out")
        if kind == "none" and self.rotary_scaling_factor != 1:
            raise ValueError("model.rotary_scaling_factor needs a kind in model.rotary_scaling: linear, llama3 or yarn")
        if kind in ("none", "linear") and bounds != (None, None, None):
            raise ValueError(
                "model.rotary_original_length, rotary_scaling_low and rotary_scaling_high are for "
                "model.rotary_scaling llama3 or yarn: leave them out"
            )
        if kind in ("llama3", "yarn"):
            if self.rotary_original_length is None:
                raise ValueError(f"model.rotary_scaling {kind} needs model.rotary_original_length")
            low, high = self.rotary_turns
            if low >= high:
                raise ValueError(f"model.rotary_scaling_low {low:g} must be below model.rotary_scaling_high {high:g}")
        return self

    @property
    def rotary_turns(self) -> tuple[float, float]:
        """rotary_scaling_low and rotary_scaling_high, null resolved."""
        return self.rotary_scaling_low or 1.0, self.rotary_scaling_high or (
            4.0 if self.rotary_scaling == "llama3" else 32.0
        )

    @model_validator(mode="after")
    def _experts(self) -> ModelConfig:
        if self.moe_num_experts == 0:
            fields = ("moe_shared_experts", "moe_jitter", "moe_bias_rate", "moe_intermediate_size", "moe_first_layer")
            given = [name for name in fields if getattr(self, name)]
            if given:
                raise ValueError(f"model.{given[0]} needs experts: give model.moe_num_experts, or leave it out")
            return self
        if self.moe_top_k > self.moe_num_experts:
            raise ValueError(
                f"model.moe_top_k {self.moe_top_k} is more than the {self.moe_num_experts} of model.moe_num_experts"
            )
        if self.moe_first_layer >= (self.num_unique_layers or self.num_layers):
            raise ValueError(
                f"model.moe_first_layer {self.moe_first_layer} is beyond the last layer: "
                "no layer would have experts; lower it"
            )
        if self.moe_router == "sinkhorn" and self.moe_bias_rate:
            raise ValueError("model.moe_bias_rate is for model.moe_router topk: sinkhorn balances by itself")
        return self

    @model_validator(mode="after")
    def _layers(self) -> ModelConfig:
        if self.num_layers > MOST_LAYERS:  # before anything looks at each of them
            raise ValueError(f"model.num_layers {self.num_layers} is beyond {MOST_LAYERS}: make it smaller")
        if self.norm_placement == "post" and self.residual != "sequential":
            raise ValueError("model.norm_placement post needs model.residual sequential")
        if self.head_bias and self.tie_embeddings:
            raise ValueError("model.head_bias needs a head of its own: set model.tie_embeddings to false")
        if self.mtp_depth and self.soft_prompt_tokens:
            raise ValueError("model.mtp_depth is for training a whole model: with model.soft_prompt_tokens set it to 0")
        if self.tie_norms and self.residual != "parallel":
            raise ValueError("model.tie_norms needs model.residual parallel: the sequential MLP reads another input")
        if self.soft_prompt_text is not None and not self.soft_prompt_tokens:
            raise ValueError("model.soft_prompt_text needs model.soft_prompt_tokens, the number of vectors: set it")
        if self.num_unique_layers and self.num_layers % self.num_unique_layers:
            raise ValueError(
                f"model.num_layers {self.num_layers} is not a multiple of "
                f"model.num_unique_layers {self.num_unique_layers}"
            )
        check_attention(self)
        check_mup(self)
        return self
