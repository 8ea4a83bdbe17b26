"""A model's size from its configuration alone: parameters, FLOPs per token, bytes.

Nothing is built and torch is not imported, so a plan for 100B parameters is instant. The
table of shapes below is the one source for counts; a test holds it against the built model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

from castalia.config import Config, ModelConfig
from castalia.errors import UserError

# Parameters of each norm over h numbers; a registered one is taken to have a gain alone.
NORM_PARAMETERS: dict[str, tuple[str, ...]] = {
    "layernorm": ("weight", "bias"),
    "non_parametric_layernorm": (),
}

# Tables whose rows are looked up, or put in as they are: no matrix product reads them.
LOOKED_UP = ("position_embedding.weight", "relative_bias.weight", "soft_prompt.weight")


def parameter_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by canonical name (docs/contracts.md, section 4.1)."""
    h, d, f = model.hidden_size, model.head_size, model.mlp_size
    n, k = model.num_attention_heads, model.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab_size, h)}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, size: int = h) -> None:
        for kind in NORM_PARAMETERS.get(model.norm, ("weight",)):
            shapes[f"{name}.{kind}"] = (1,) if model.norm == "scalenorm" else (size,)

    if model.position == "learned":
        if model.max_position_embeddings is None:
            raise UserError("model.max_position_embeddings is not set: learned positions need the size of their table")
        shapes["position_embedding.weight"] = (model.max_position_embeddings, h)
    if model.position == "rpe":
        shapes["relative_bias.weight"] = (model.rpe_num_buckets, n)
    if model.soft_prompt_tokens:
        shapes["soft_prompt.weight"] = (model.soft_prompt_tokens, h)
    for i in range(model.num_unique_layers or model.num_layers):
        norm(f"layers.{i}.attention_norm")
        linear(f"layers.{i}.attention.qkv", (n + 2 * k) * d, h, model.attention_bias)
        if model.qk_norm:
            norm(f"layers.{i}.attention.qk_norm", n * d)
        linear(f"layers.{i}.attention.out", h, n * d, model.attention_bias)
        if not model.tie_norms:
            norm(f"layers.{i}.mlp_norm")
        if model.gated:
            linear(f"layers.{i}.mlp.gate", f, h, model.mlp_bias)
        linear(f"layers.{i}.mlp.up", f, h, model.mlp_bias)
        linear(f"layers.{i}.mlp.down", h, f, model.mlp_bias)
    norm("final_norm")
    if not model.tie_embeddings:
        shapes["head.weight"] = (vocab_size, h)
    return shapes


@dataclass(frozen=True)
class ModelSize:
    """What a model weighs and costs.

    Attributes:
        total_parameters: every parameter, tied and shared ones once.
        non_embedding_parameters: without the embedding, the output matrix and what is looked up by position.
        flops_per_token: forward and backward, multiply and add counted apart: six for each
            weight of a layer as often as it is executed, plus attention over the whole square (not halved for
            the causal mask), as PaLM's appendix B counts.
        weight_bytes, gradient_bytes, optimizer_bytes: fp32 weights and gradients, two fp32
            moments; of a soft prompt alone, where there is one, as all else is frozen.
        working_bytes: bf16 copies of the matrices, where precision is bf16.
    """

    total_parameters: int
    non_embedding_parameters: int
    flops_per_token: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    working_bytes: int

    def as_dict(self) -> dict[str, int]:
        """For `--json`."""
        return asdict(self)


def model_size(config: Config, vocab_size: int | None = None) -> ModelSize:
    """Count a configuration.

    Args:
        config: the run.
        vocab_size: padded vocabulary, where model.vocab_size leaves it to the tokenizer.

    Raises:
        UserError: the vocabulary is not known.
    """
    model = config.model
    vocab = vocab_size or model.vocab_size
    if vocab is None:
        raise UserError("model.vocab_size is not set and there is no tokenizer to take it from: give model.vocab_size")
    if model.max_position_embeddings is None:
        model = model.model_copy(update={"max_position_embeddings": config.max_positions})
    shapes = parameter_shapes(model, vocab)
    total = sum(map(prod, shapes.values()))
    ends = ("embedding.weight", "head.weight", *LOOKED_UP)
    inner = total - sum(prod(shapes[name]) for name in ends if name in shapes)
    layers = sum(prod(s) for name, s in shapes.items() if name.startswith("layers."))
    repeats = model.num_layers // (model.num_unique_layers or model.num_layers)
    only_read = LOOKED_UP if model.tie_embeddings else ("embedding.weight", *LOOKED_UP)
    matrices = sum(prod(s) for name, s in shapes.items() if len(s) == 2 and name not in only_read)
    trained = prod(shapes["soft_prompt.weight"]) if model.soft_prompt_tokens else total
    return ModelSize(
        total_parameters=total,
        non_embedding_parameters=inner,
        flops_per_token=flops_per_token(model, inner + (repeats - 1) * layers, vocab, config.data.seq_length),
        weight_bytes=4 * total,
        gradient_bytes=4 * trained,
        optimizer_bytes=8 * trained,
        working_bytes=2 * matrices if config.training.precision == "bf16" else 0,
    )


def flops_per_token(model: ModelConfig, executed: int, vocab_size: int, seq_length: int) -> int:
    """6 N + 6 V h + 12 L n d s: training FLOPs per token (Chowdhery et al. 2022, appendix B).

    `executed` is N: parameters without embeddings, shared ones as often as they are used.
    """
    attention = 12 * model.num_layers * model.num_attention_heads * model.head_size * seq_length
    return 6 * executed + 6 * vocab_size * model.hidden_size + attention
