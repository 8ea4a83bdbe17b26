"""GPT-NeoX's names, shapes and shards <-> ours: the table, and how ranks share tensors.

    ranks' state dicts ─merge shards─> whole tensors, their names ─table─> ours

Their names here are `I.NAME`: I counts GPT-NeoX's list of modules: 0 the embedding, 1 a function,
2..N+1 the layers, N+2 a function, N+3 the final norm, N+4 the output matrix. v2.0 names the MLP
dense_h_to_4h and dense_4h_to_h, later versions linear1 and linear2. (Format of EleutherAI/gpt-neox.)

Two things do not go one to one. The table of relative positions is one for all layers, and stands
under each of them in their files; and with tied norms their second norm is there, but unused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from castalia.config import ModelConfig
from castalia.config.attention import GATED_MLPS
from castalia.convert.table import Row, join_qkv, split_qkv, to_theirs
from castalia.errors import UserError

Naming = Literal["main", "v2.0", "w123"]

# How tensor-parallel ranks share a tensor.
Sharding = Literal["rows", "columns", "replicated", "row_bias"]

_MLP_NAMES: dict[Naming, tuple[str, ...]] = {
    "main": ("linear1", "linear2"),
    "v2.0": ("dense_h_to_4h", "dense_4h_to_h"),
    "w123": ("w1", "w3", "w2"),  # 2023's separate Llama MLP: gate, up, down
}

# Our names of a norm's parameters -> theirs.
_NORM_NAMES: dict[str, dict[str, str]] = {
    "layernorm": {"weight": "weight", "bias": "bias"},
    "rmsnorm": {"weight": "scale"},
    "rmsnorm_eps_outside": {"weight": "scale"},
    "scalenorm": {"weight": "g"},
    "non_parametric_layernorm": {},
}


@dataclass(frozen=True)
class NeoXRow(Row):
    """A row of the table, with how ranks share the tensors on GPT-NeoX's side.

    A row without `ours` is of a tensor that their model does not use: written, and not read.

    Attributes:
        sharding: see `merge_shards`.
        parts: relative sizes of the blocks that lie one after the other in each rank's rows.
    """

    sharding: Sharding = "replicated"
    parts: tuple[int, ...] = (1,)


# Fields whose other values add or move tensors that GPT-NeoX has not, or whose layout there is not known yet.
_ONLY_PLAIN = {
    **{"norm_placement": "pre", "attention_out_bias": True, "head_bias": False, "rotary_scaling": "none"},
    **{"moe_num_experts": 0, "mtp_depth": 0},
}


def table(model: ModelConfig, naming: Naming = "main") -> list[NeoXRow]:
    """The table of this model, in the order of GPT-NeoX's modules; their names are `I.NAME`.

    Raises:
        UserError: GPT-NeoX has no such model.
    """
    if model.norm not in _NORM_NAMES:
        raise UserError(f"model.norm: GPT-NeoX has no '{model.norm}': it can be one of {', '.join(_NORM_NAMES)}")
    if model.num_unique_layers not in (None, model.num_layers):
        raise UserError(
            f"model.num_unique_layers: is {model.num_unique_layers}, but GPT-NeoX gives every layer weights of its "
            "own, whatever it is told: take it out"
        )
    if model.soft_prompt_tokens:
        raise UserError(
            f"model.soft_prompt_tokens: is {model.soft_prompt_tokens}, but GPT-NeoX can neither train nor load "
            "a soft prompt: set it to 0"
        )
    gated = [kind for kind in model.attention_kinds if kind in GATED_MLPS]
    if gated:
        raise UserError(f"model.attention: the tensors of {gated[0]} layers cannot be converted to or from GPT-NeoX's")
    for key, plain in _ONLY_PLAIN.items():
        if getattr(model, key) != plain:
            raise UserError(f"model.{key}: is {getattr(model, key)}, which GPT-NeoX's checkpoints cannot hold")
    if model.stable_embedding not in ("none", "positions"):
        raise UserError(
            f"model.stable_embedding: is {model.stable_embedding}, but GPT-NeoX norms learned positions alone"
        )
    if naming == "w123" and not model.gated:
        raise UserError(
            f"model.activation: '{model.activation}' is not gated, but the checkpoint's MLPs (w1, w2, w3) are"
        )
    layers = model.num_layers
    rows = [NeoXRow(("embedding.weight",), ("0.word_embeddings.weight",), sharding="rows")]
    if model.position == "learned":
        rows.append(NeoXRow(("position_embedding.weight",), ("0.position_embeddings.weight",)))
    if model.stable_embedding == "positions":
        norm = "position_embedding_norm", "0.position_embeddings.norm"
        rows += [NeoXRow((f"{norm[0]}.{part}",), (f"{norm[1]}.{part}",)) for part in ("weight", "bias")]
    if model.position == "rpe":
        rows.append(_shared_row("relative_bias.weight", [f"{i + 2}.attention.rpe.weight" for i in range(layers)]))
    for layer in range(layers):
        rows += _layer_rows(model, f"layers.{layer}", str(layer + 2), naming)
    rows += _norm_rows(model, "final_norm", f"{layers + 3}.norm")
    if not model.tie_embeddings:
        rows.append(NeoXRow(("head.weight",), (f"{layers + 4}.final_linear.weight",), sharding="rows"))
    return rows


def _layer_rows(model: ModelConfig, ours: str, theirs: str, naming: Naming) -> list[NeoXRow]:
    kinds = ("weight", "bias") if model.attention_bias else ("weight",)
    rows = _norm_rows(model, f"{ours}.attention_norm", f"{theirs}.input_layernorm")
    for kind in kinds:
        rows.append(_qkv_row(model, f"{ours}.attention.qkv.{kind}", f"{theirs}.attention.query_key_value.{kind}"))
    if model.qk_norm:
        rows += _qk_norm_rows(model, f"{ours}.attention.qk_norm", f"{theirs}.attention.qk_layernorm")
    rows += [_output_row(f"{ours}.attention.out.{kind}", f"{theirs}.attention.dense.{kind}") for kind in kinds]
    if model.tie_norms:
        rows += _unused_norm_rows(model, f"{theirs}.post_attention_layernorm")
    else:
        rows += _norm_rows(model, f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
    *inner, outer = _MLP_NAMES[naming]
    for kind in ("weight", "bias") if model.mlp_bias else ("weight",):
        up, gate, down = (f"{ours}.mlp.{part}.{kind}" for part in ("up", "gate", "down"))
        names = [f"{theirs}.mlp.{name}.{kind}" for name in inner]
        if naming == "w123":
            rows += [NeoXRow((our,), (name,), sharding="rows") for our, name in zip((gate, up), names, strict=True)]
        elif model.gated:
            rows.append(NeoXRow((up, gate), (names[0],), _stack, _halves, "rows", (1, 1)))
        else:
            rows.append(NeoXRow((up,), (names[0],), sharding="rows"))
        rows.append(_output_row(down, f"{theirs}.mlp.{outer}.{kind}"))
    return rows


def _norm_rows(model: ModelConfig, ours: str, theirs: str) -> list[NeoXRow]:
    return [NeoXRow((f"{ours}.{our}",), (f"{theirs}.{their}",)) for our, their in _NORM_NAMES[model.norm].items()]


def _unused_norm_rows(model: ModelConfig, theirs: str) -> list[NeoXRow]:
    """A norm as it starts: nothing of ours <-> ones, zeros for a bias."""
    size = 1 if model.norm == "scalenorm" else model.hidden_size

    def row(our: str, their: str) -> NeoXRow:
        value = torch.zeros(size) if our == "bias" else torch.ones(size)
        return NeoXRow((), (f"{theirs}.{their}",), lambda _: [value.clone()], lambda _: [])

    return [row(our, their) for our, their in _NORM_NAMES[model.norm].items()]


def _qk_norm_rows(model: ModelConfig, ours: str, theirs: str) -> list[NeoXRow]:
    """One vector over all heads <-> a matrix, a row for each head; ScaleNorm's one number is the same number."""
    if model.norm == "scalenorm":
        return _norm_rows(model, ours, theirs)
    shape = (model.num_attention_heads, model.head_size)

    def forward(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].reshape(shape)]

    def backward(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].reshape(shape).flatten()]

    return [
        NeoXRow((f"{ours}.{our}",), (f"{theirs}.{their}",), forward, backward, "rows")
        for our, their in _NORM_NAMES[model.norm].items()
    ]


def _shared_row(ours: str, theirs: Sequence[str]) -> NeoXRow:
    """One table <-> the same under each layer, a column for each head."""

    def forward(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0]] * len(theirs)

    def backward(tensors: Sequence[Tensor]) -> list[Tensor]:
        for name, tensor in zip(theirs, tensors, strict=True):
            if not torch.equal(tensor, tensors[0]):
                raise UserError(
                    f"{name}: differs from {theirs[0]}, but one table of relative positions serves all layers: "
                    "pipeline stages trained copies of their own, which is another model"
                )
        return [tensors[0]]

    return NeoXRow((ours,), tuple(theirs), forward, backward, "columns")


def check_ranks(model: ModelConfig, ranks: int) -> None:
    """Refuse a number of tensor-parallel ranks with which GPT-NeoX computes another function.

    Its layer norm of queries and keys takes the heads of one rank together, ours all of them.

    Raises:
        UserError: it does.
    """
    if ranks > 1 and model.qk_norm and model.norm in ("layernorm", "non_parametric_layernorm"):
        raise UserError(
            f"model.qk_norm: with model.norm {model.norm} GPT-NeoX normalises each tensor-parallel rank's heads apart, "
            f"which with {ranks} ranks is another model: only checkpoints of one rank can be converted"
        )


def _output_row(ours: str, theirs: str) -> NeoXRow:
    return NeoXRow((ours,), (theirs,), sharding="row_bias" if ours.endswith("bias") else "columns")


def _qkv_row(model: ModelConfig, ours: str, theirs: str) -> NeoXRow:
    heads, kv_heads, size = model.num_attention_heads, model.kv_heads, model.head_size
    if heads == kv_heads:  # per head q, k, v: the same as ours
        return NeoXRow((ours,), (theirs,), sharding="rows")
    # Grouped queries: each rank has all its queries, then its keys, then its values.
    sizes = [heads * size, kv_heads * size, kv_heads * size]

    def forward(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(split_qkv(tensors[0], heads, kv_heads, size))]

    def backward(tensors: Sequence[Tensor]) -> list[Tensor]:
        query, key, value = tensors[0].split(sizes)
        return [join_qkv(query, key, value, kv_heads, size)]

    return NeoXRow((ours,), (theirs,), forward, backward, "rows", (heads, kv_heads, kv_heads))


def _stack(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """linear1 is [up | gate] (v2.0's geglu calls the halves x and gate)."""
    return [torch.cat(list(tensors))]


def _halves(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors[0].chunk(2)


def merge_shards(
    row: NeoXRow, shards: Sequence[Tensor], parallel_residual: bool, hidden_size: int, moment: bool = False
) -> Tensor:
    """One tensor of all tensor-parallel ranks.

    Args:
        parallel_residual: every rank's output, its bias included, is summed by one reduction, so that the
            bias is the sum of the ranks'; with a sequential residual it is added once and all ranks hold it.
        moment: these are Adam's moments; of what every rank holds, their mean is taken.
    """
    if len(shards) == 1:
        return shards[0]
    if row.sharding == "columns":
        return torch.cat(list(shards), dim=1)
    if row.sharding == "rows":
        if row.ours == ("head.weight",) and shards[0].shape[1] != hidden_size:
            return torch.cat(list(shards), dim=1)  # output_layer_parallelism: row
        blocks = [_blocks(shard, row.parts) for shard in shards]
        return torch.cat([torch.cat(same) for same in zip(*blocks, strict=True)])
    summed = row.sharding == "row_bias" and parallel_residual and not moment
    if not summed and all(torch.equal(shard, shards[0]) for shard in shards[1:]):
        return shards[0]
    total = torch.stack([shard.float() for shard in shards]).sum(0)
    if summed:
        return total
    # Norms of old runs have drifted apart between ranks; GPT-NeoX's own tools take their mean.
    return total / len(shards)


def split_shards(row: NeoXRow, whole: Tensor, ranks: int, parallel_residual: bool) -> list[Tensor]:
    """The inverse of `merge_shards` (row biases under a parallel residual are shared out evenly)."""
    if ranks == 1:
        return [whole]
    if row.sharding == "columns":
        return list(whole.chunk(ranks, dim=1))
    if row.sharding == "rows":
        blocks = [block.chunk(ranks) for block in _blocks(whole, row.parts)]
        return [torch.cat(list(of_rank)) for of_rank in zip(*blocks, strict=True)]
    if row.sharding == "row_bias" and parallel_residual:
        return [whole / ranks] * ranks
    return [whole] * ranks


def _blocks(tensor: Tensor, parts: tuple[int, ...]) -> Sequence[Tensor]:
    return tensor.split([part * len(tensor) // sum(parts) for part in parts])


def to_gptneox(
    weights: Mapping[str, Tensor], model: ModelConfig, ranks: int = 1, naming: Naming = "main"
) -> list[dict[str, Tensor]]:
    """Our weights as the state dicts (`module`) of GPT-NeoX's tensor-parallel ranks, sequential layout.

    Raises:
        UserError: a weight is missing or left over, or a tensor cannot be shared evenly.
    """
    rows = table(model, naming)
    if any(size % ranks for size in (model.num_attention_heads, model.kv_heads, model.mlp_size, model.hidden_size)):
        raise UserError(f"tensor parallel {ranks}: heads, key/value heads, hidden and MLP size must divide by it")
    check_ranks(model, ranks)
    whole = to_theirs(rows, weights, "the weights")
    state: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for row in rows:
        for name in row.theirs:
            parts = split_shards(row, whole[name], ranks, model.residual == "parallel")
            for rank, part in enumerate(parts):
                state[rank][f"sequential.{name}"] = part
    return state


def naming_of(module: Iterable[str]) -> Naming:
    """Which release's names a state dict has."""
    names = set(module)
    for naming, parts in _MLP_NAMES.items():
        if any(f".mlp.{parts[0]}." in name for name in names):
            return naming
    return "main"
