"""gMLP and aMLP: layers in which tokens are mixed by trained weights of their places (Liu et al. 2021).

    x ─norm─up─activation─┬─ value [B,S,f] ──────────────────────────┐
           [B,S,2f]       ├─ gate  [B,S,f] ─norm─ W gate + b ─(+)──── * ─down─> y = x + ...
                          └─ amlp: one small head of attention ─┘
    W [P,P] is lower triangular: place i is mixed from places j <= i

In documents that are kept apart, places are counted from a document's start, so each is mixed as it
would be alone. A cache keeps the normed gates. What is mended of GPT-NeoX: its block has no residual
connection, drops the biases of both projections, and takes the length of the sequence from the batch.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from castalia.config import ModelConfig
from castalia.errors import UserError
from castalia.model.attention import Core
from castalia.model.attention_mask import Documents, Drop
from castalia.model.dropout import dropout
from castalia.model.layers import Context, Linear
from castalia.model.norms import make_norm, wide
from castalia.model.registry import ACTIVATIONS, CORES, look_up


class SpatialGate(nn.Module):
    """W gate + b along the sequence, with a norm before and for aMLP a small attention beside it."""

    def __init__(self, cfg: ModelConfig, attends: bool) -> None:
        super().__init__()
        if cfg.max_position_embeddings is None:
            raise UserError("model.max_position_embeddings is not set: gmlp layers need the size of their weights")
        places = cfg.max_position_embeddings + cfg.soft_prompt_tokens
        self.norm = make_norm(cfg, cfg.mlp_size)
        self.spatial = Linear(places, places)
        self.attention = SmallAttention(cfg) if attends else None

    def forward(self, x: Tensor, gate: Tensor, layer: int, context: Context) -> Tensor:
        """Inner `[B, S, 2f]` and its half `[B, S, f]` to the gate `[B, S, f]`."""
        weight, bias = self.spatial.weight.tril(), self.spatial.bias.to(self.spatial.weight.dtype)
        gate = self.norm(gate).to(weight.dtype)
        past, small = 0, None if self.attention is None else self.attention.project(x)
        if context.cache is not None:
            past = context.cache.length
            sizes = [gate.shape[-1]] if small is None else [gate.shape[-1], *(t.shape[-1] for t in small[1:])]
            stored = gate if small is None else torch.cat([gate, *small[1:]], -1)
            stored = context.cache.update(layer, stored.unsqueeze(1), stored.unsqueeze(1)[..., :0])[0].squeeze(1)
            gate, *keys = stored.split(sizes, -1)
            small = None if small is None else (small[0], *keys)
        end = gate.shape[1]
        if end > len(bias):
            raise UserError(
                f"a sequence of {end} tokens is beyond the {len(bias)} places of a gmlp layer: shorten it or raise "
                "model.max_position_embeddings"
            )
        if context.documents is None:
            mixed = weight[past:end, :end] @ gate + bias[past:end].unsqueeze(-1)
        else:
            mixed = mix_documents(weight, bias, gate, context.documents)
        if self.attention is not None and small is not None:
            mixed = mixed + self.attention(small, layer, context)
        return mixed


@torch.compiler.disable
def mix_documents(weight: Tensor, bias: Tensor, gate: Tensor, documents: Documents) -> Tensor:
    """W gate + b in each document by itself: those of like length together, the end filled up.

    What fills up comes after all that is real, so no real place is mixed from it. Weights grow with the square of a
    length, so lengths are rounded up to a power of 2.
    """
    B, S, f = gate.shape
    groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, spans in enumerate(documents.spans()):
        for start, end in spans:
            groups[min(1 << (end - start - 1).bit_length(), S)].append((row * S + start, row * S + end))
    flat, parts, places = gate.reshape(B * S, f), [], torch.empty(B * S, dtype=torch.long)
    filled = 0
    for length, spans in groups.items():
        firsts, lasts = (torch.tensor(t).unsqueeze(1) for t in zip(*spans, strict=True))
        index = firsts + torch.arange(length)
        real = index < lasts
        places[index[real]] = filled + torch.arange(index.numel())[real.flatten()]
        filled += index.numel()
        index = torch.minimum(index, lasts - 1).flatten().to(gate.device)
        some = flat.index_select(0, index).view(len(spans), length, f)
        parts.append((weight[:length, :length] @ some + bias[:length].unsqueeze(-1)).flatten(0, 1))
    return torch.cat(parts).index_select(0, places.to(gate.device)).view(B, S, f)


class SmallAttention(nn.Module):
    """One head of width a, from the inner activations `[B, S, 2f]` to the gate's `[B, S, f]`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.dropout = cfg.attention_dropout
        self.core: Core = look_up(CORES, cfg.attention_core, "model.attention_core")
        self.qkv = Linear(2 * cfg.mlp_size, 3 * cfg.amlp_size, bias=cfg.attention_bias)
        self.out = Linear(cfg.amlp_size, cfg.mlp_size, bias=cfg.attention_bias)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each `[B, S, a]`."""
        return self.qkv(x).chunk(3, -1)

    def forward(self, qkv: tuple[Tensor, ...], layer: int, context: Context) -> Tensor:
        """Queries `[B, S, a]`, keys and values `[B, T, a]` to `[B, S, f]`."""
        q, k, v = (t.unsqueeze(1) for t in qkv)
        drop = None
        if context.dropout is not None and self.dropout > 0:
            drop = Drop(context.dropout, self.dropout, layer, k.shape[2])
        return self.out(self.core(q, k, v, context.mask(layer), drop).squeeze(1))


class GatedMLP(nn.Module):
    """y = x + down(value * gate)."""

    attends = False

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = cfg.hidden_dropout
        self.activation = look_up(ACTIVATIONS, cfg.activation, "model.activation")
        self.norm = make_norm(cfg)
        self.up = Linear(cfg.hidden_size, 2 * cfg.mlp_size, bias=cfg.mlp_bias)
        self.gate = SpatialGate(cfg, self.attends)
        self.down = Linear(cfg.mlp_size, cfg.hidden_size, bias=cfg.mlp_bias)

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """fp32 `[B, S, h]` to fp32 `[B, S, h]`; `layer` is the number of the executed layer."""
        inner = self.activation(self.up(self.norm(x)))
        value, gate = inner.chunk(2, -1)
        branch = self.down(value * self.gate(inner, gate, layer, context))
        return x + dropout(wide(branch), self.dropout, context.dropout, "mlp", layer)


class GMLPBlock(GatedMLP):
    """Without attention."""


class AMLPBlock(GatedMLP):
    """With a small attention added to the gate."""

    attends = True


GATED_BLOCKS: dict[str, type[GatedMLP]] = {"gmlp": GMLPBlock, "amlp": AMLPBlock}
"""The blocks of the kinds that have no attention of their own, by kind."""
