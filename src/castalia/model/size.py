"""A model's size from its configuration alone: parameters, FLOPs per token, bytes.

Nothing is built and torch is not imported, so a plan for 100B parameters is instant. The
table of shapes below is the one source for counts; a test holds it against the built model.
Layers that are alike are written down once and counted, so that their number costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod

from castalia.config import Config, ModelConfig
from castalia.config.attention import GATED_MLPS
from castalia.errors import UserError
from castalia.model.optimizer_size import state_bytes

# Parameters of each norm over h numbers; a registered one is taken to have a gain alone.
NORM_PARAMETERS: dict[str, tuple[str, ...]] = {
    "layernorm": ("weight", "bias"),
    "non_parametric_layernorm": (),
}

# Tables whose rows are looked up, or put in as they are: no matrix product reads them.
LOOKED_UP = ("position_embedding.weight", "relative_bias.weight", "soft_prompt.weight")


Shapes = dict[str, tuple[int, ...]]
Kind = tuple[str, bool]
"""What a layer's shapes depend on: its kind of attention, and whether it has experts."""


def parameter_shapes(model: ModelConfig, vocab_size: int) -> Shapes:
    """Shape of every parameter by canonical name (docs/contracts.md, section 4.1)."""
    shapes: Shapes = {}
    for times, names, part in _parts(model, vocab_size):
        for i in times:
            shapes |= {f"{names.format(i)}{name}": shape for name, shape in part.items()}
    return shapes


def _parts(model: ModelConfig, vocab_size: int) -> list[tuple[Sequence[int], str, Shapes]]:
    """The model in parts that are alike: their numbers, what their names begin with, and the shapes of one."""
    of_kind: dict[Kind, list[int]] = {}
    for layer, kind in sorted(dict(zip(model.layer_order, model.attention_kinds, strict=True)).items()):
        of_kind.setdefault((kind, model.has_experts(layer)), []).append(layer)
    blocks = {kind: _block_shapes(model, *kind) for kind in of_kind}
    last = next(kind for kind, layers in of_kind.items() if layers[-1] == max(model.layer_order))
    parts: list[tuple[Sequence[int], str, Shapes]] = [((0,), "", _ends(model, vocab_size))]
    parts += [(layers, "layers.{}.", blocks[kind]) for kind, layers in of_kind.items()]
    if model.mtp_depth:
        h = model.hidden_size
        ahead = {f"block.{name}": shape for name, shape in blocks[last].items()}
        for norm in ("hidden_norm", "embedding_norm", "norm"):
            ahead |= _norm(model, norm, h)
        parts.append((range(model.mtp_depth), "mtp.{}.", ahead | _linear("join", h, 2 * h, False)))
    return parts


def _ends(model: ModelConfig, vocab_size: int) -> Shapes:
    """What stands before and after the layers."""
    h = model.hidden_size
    shapes: Shapes = {"embedding.weight": (vocab_size, h)}
    if model.position == "learned":
        if model.max_position_embeddings is None:
            raise UserError("model.max_position_embeddings is not set: learned positions need the size of their table")
        shapes["position_embedding.weight"] = (model.max_position_embeddings, h)
    if model.position == "rpe":
        shapes["relative_bias.weight"] = (model.rpe_num_buckets, model.num_attention_heads)
    if model.soft_prompt_tokens:
        shapes["soft_prompt.weight"] = (model.soft_prompt_tokens, h)
    for table in model.normed_embeddings:
        shapes |= {f"{table}_norm.{part}": (h,) for part in NORM_PARAMETERS["layernorm"]}
    shapes |= _norm(model, "final_norm", h)
    if not model.tie_embeddings:
        shapes |= _linear("head", vocab_size, h, model.head_bias)
    return shapes


def _block_shapes(model: ModelConfig, kind: str, experts: bool) -> Shapes:
    """Those of a layer of a kind, by their names within it."""
    h, d, f, n, k = model.hidden_size, model.head_size, model.mlp_size, model.num_attention_heads, model.kv_heads
    shapes: Shapes = {}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes.update(_linear(name, rows, columns, bias))

    def norm(name: str, size: int = h) -> None:
        shapes.update(_norm(model, name, size))

    if kind in GATED_MLPS:
        if model.max_position_embeddings is None:
            raise UserError("model.max_position_embeddings is not set: gmlp layers need the size of their weights")
        places = model.max_position_embeddings + model.soft_prompt_tokens
        norm("norm")
        linear("up", 2 * f, h, model.mlp_bias)
        norm("gate.norm", f)
        linear("gate.spatial", places, places, True)
        if kind == "amlp":
            linear("gate.attention.qkv", 3 * model.amlp_size, 2 * f, model.attention_bias)
            linear("gate.attention.out", f, model.amlp_size, model.attention_bias)
        linear("down", h, f, model.mlp_bias)
        return shapes
    norm("attention_norm")
    linear("attention.qkv", (n + 2 * k) * d, h, model.attention_bias)
    if model.qk_norm is True:
        norm("attention.qk_norm", n * d)
    elif model.qk_norm:
        norm("attention.q_norm", d if model.qk_norm == "head" else n * d)
        norm("attention.k_norm", d if model.qk_norm == "head" else k * d)
    linear("attention.out", h, n * d, model.attention_bias and model.attention_out_bias)
    if not model.tie_norms:
        norm("mlp_norm")
    parts = {"gate": (f, h), "up": (f, h), "down": (h, f)}
    if not model.gated:
        del parts["gate"]
    if not experts:
        for part, (rows, columns) in parts.items():
            linear(f"mlp.{part}", rows, columns, model.mlp_bias)
        return shapes
    E, wide = model.moe_num_experts, model.moe_shared_experts * model.expert_size
    linear("mlp.router", E, h, model.moe_bias_rate > 0)
    for part in parts:
        rows, columns = (h, model.expert_size) if part == "down" else (model.expert_size, h)
        shapes[f"mlp.experts.{part}.weight"] = (E, rows, columns)
        if wide:
            rows, columns = (h, wide) if part == "down" else (wide, h)
            linear(f"mlp.shared.{part}", rows, columns, False)
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def _norm(model: ModelConfig, name: str, size: int) -> Shapes:
    shape = (1,) if model.norm == "scalenorm" else (size,)
    return {f"{name}.{kind}": shape for kind in NORM_PARAMETERS.get(model.norm, ("weight",))}


@dataclass(frozen=True)
class ModelSize:
    """What a model weighs and costs.

    Attributes:
        total_parameters: every parameter, tied and shared ones once.
        active_parameters: those that a token meets: all but the experts that are not chosen for it.
        non_embedding_parameters: without the embedding, the output matrix and what is looked up by position.
        flops_per_token: forward and backward, multiply and add counted apart: six for each
            weight of a layer as often as it is executed, plus attention over the whole square (not halved for
            the causal mask), as PaLM's appendix B counts. Of experts, those that a token meets.
        weight_bytes, gradient_bytes, optimizer_bytes: fp32 weights and gradients, and the state of the
            optimizer; of a soft prompt alone, where there is one, as all else is frozen.
        working_bytes: 16-bit copies of the matrices, where precision is not fp32.
    """

    total_parameters: int
    active_parameters: int
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
    parts = _parts(model, vocab)

    def count(of: Callable[[str, tuple[int, ...]], int]) -> int:
        return sum(len(times) * of(name, shape) for times, _, part in parts for name, shape in part.items())

    ends = ("embedding.weight", "head.weight", "head.bias", *LOOKED_UP)
    total = count(lambda name, shape: prod(shape))
    inner = count(lambda name, shape: 0 if name in ends else prod(shape))
    active = count(lambda name, shape: _met(model, name, shape))
    layers = sum(
        len(times) * _met(model, name, shape)
        for times, names, part in parts
        if names.startswith("layers.")
        for name, shape in part.items()
    )
    repeats = model.num_layers // (model.num_unique_layers or model.num_layers)
    only_read = LOOKED_UP if model.tie_embeddings else ("embedding.weight", *LOOKED_UP)
    low = count(
        lambda name, shape: (
            prod(shape) if len(shape) > 1 and name not in only_read and not name.endswith("router.weight") else 0
        )
    )

    def is_trained(name: str) -> bool:
        return name == "soft_prompt.weight" if model.soft_prompt_tokens else not name.endswith("router.bias")

    return ModelSize(
        total_parameters=total,
        active_parameters=active,
        non_embedding_parameters=inner,
        flops_per_token=flops_per_token(
            model, inner - total + active + (repeats - 1) * layers, vocab, config.data.seq_length
        ),
        weight_bytes=4 * total,
        gradient_bytes=4 * count(lambda name, shape: prod(shape) if is_trained(name) else 0),
        optimizer_bytes=sum(
            len(times) * state_bytes(config.optimizer, f"{names}{name}", shape)
            for times, names, part in parts
            for name, shape in part.items()
            if is_trained(name)
        ),
        working_bytes=2 * low if config.training.precision != "fp32" else 0,
    )


def _met(model: ModelConfig, name: str, shape: tuple[int, ...]) -> int:
    """Numbers of a parameter that one token meets."""
    return prod(shape) * model.moe_top_k // model.moe_num_experts if ".experts." in name else prod(shape)


def flops_per_token(model: ModelConfig, executed: int, vocab_size: int, seq_length: int) -> int:
    """6 N + 6 V h + 12 L n d s: training FLOPs per token (Chowdhery et al. 2022, appendix B).

    `executed` is N: parameters without embeddings, shared ones as often as they are used, of experts those
    that are chosen. Modules that look ahead read the output matrix once more each.
    """
    passes = 1 + model.mtp_depth
    kinds = model.attention_kinds
    attention = sum(_mixing_flops(model, kind, seq_length) for kind in kinds + kinds[-1:] * model.mtp_depth)
    return 6 * executed + 6 * passes * vocab_size * model.hidden_size + attention


def _mixing_flops(model: ModelConfig, kind: str, seq_length: int) -> int:
    """FLOPs per token of what mixes tokens in one layer, over the keys that its kind sees on average."""
    if kind in GATED_MLPS:
        # The weights of places are no matrix that each token is multiplied by, as N takes them for.
        places = (model.max_position_embeddings or 0) + model.soft_prompt_tokens
        small = 12 * model.amlp_size * seq_length if kind == "amlp" else 0
        return 6 * model.mlp_size * seq_length + small - 6 * places * (places + 1)
    return 12 * model.num_attention_heads * model.head_size * min(seq_length, _keys_seen(model, kind, seq_length))


def _keys_seen(model: ModelConfig, kind: str, seq_length: int) -> int:
    """Keys of a query late in the sequence, as if nothing were masked for coming later."""
    block, random = model.attention_block, model.attention_random_blocks
    columns = model.attention_global_ends or [start + 1 for start in model.attention_global_starts]
    listed = sum(end - start for start, end in zip(model.attention_global_starts, columns, strict=True))
    blocks = {
        "global": -(-seq_length // block),
        "local": model.attention_local_blocks,
        "sparse_fixed": model.attention_local_blocks
        + seq_length // block // model.attention_local_blocks * model.attention_global_blocks,
        "sparse_variable": model.attention_window_blocks[-1] + listed + (random or 0),
        "bigbird": model.attention_sliding_blocks + model.attention_global_blocks + (1 if random is None else random),
        "bslongformer": model.attention_sliding_blocks + listed,
    }
    return (model.attention_window or seq_length) if kind == "window" else blocks[kind] * block
