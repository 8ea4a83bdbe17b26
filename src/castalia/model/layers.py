"""The parts of a block: linear maps, attention, MLP, and what the layers of a forward pass share.

Precision follows the weights that a forward pass is given, not a global mode: a matrix
product runs in the dtype of its matrix (so bf16 working copies give bf16 products), while
norms, softmax statistics and the residual stream stay fp32. The same code therefore runs
under kept bf16 copies, under FSDP2's mixed precision, and in plain fp32.

Two settings of GPT-NeoX change nothing here: `apply_query_key_layer_scaling` divides scores by
the layer's number and multiplies them back in fp32, and `attention_softmax_in_fp32` asks for
what is always so.

Shape letters: B batch, S sequence, T keys, h hidden, n query heads, k key/value heads,
g = n / k, d head size, r rotated dimensions of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.config import ModelConfig
from castalia.model.dropout import DropoutKey, dropout
from castalia.model.norms import make_norm, norm_heads, wide
from castalia.model.positions import causal, rotate
from castalia.model.registry import ACTIVATIONS, look_up


class Cache(Protocol):
    """Keys and values of earlier tokens, for generation."""

    length: int
    positions: Tensor | None
    """Position ids of what is stored, noted by models whose scores depend on distances."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `[B, k, S, d]` of the new tokens; return all of them, `[B, k, length + S, d]`."""
        ...

    def advance(self, count: int) -> None:
        """Count `count` tokens as stored; the caller of a forward pass does so for its tokens."""
        ...


class Context(NamedTuple):
    """What the layers of one forward pass share.

    Attributes:
        rotary: cos and sin as `rotate` wants them; None: positions enter otherwise.
        bias: `[1 or B, n, S, T]` to add to the scores, -inf where a key is not to be seen; None: the
            causal mask alone.
        cache: earlier keys and values; None: there are none.
        dropout: which masks; None: no dropout.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    cache: Cache | None = None
    dropout: DropoutKey | None = None


class Linear(nn.Linear):
    """y = x W^T + b in W's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` of any dtype to `[..., out]` of the weight's dtype."""
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023).

    The rows of `qkv` are grouped per key/value head (its g query heads, its key, its value),
    so that a contiguous cut serves tensor parallelism; with k = n this is GPT-NeoX's order.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.n, self.k, self.d = cfg.num_attention_heads, cfg.kv_heads, cfg.head_size
        self.dropout = cfg.attention_dropout
        self.qkv = Linear(cfg.hidden_size, (self.n + 2 * self.k) * self.d, bias=cfg.attention_bias)
        self.qk_norm = make_norm(cfg, self.n * self.d) if cfg.qk_norm else None
        self.out = Linear(self.n * self.d, cfg.hidden_size, bias=cfg.attention_bias)

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """`[B, S, h]` to `[B, S, h]`; `layer` is the number of the executed layer."""
        B, S, _ = x.shape
        group = self.n // self.k
        rows = self.qkv(x).view(B, S, self.k, group + 2, self.d)
        q, k, v = rows.split([group, 1, 1], 3)
        q, k, v = q.reshape(B, S, self.n, self.d), k.squeeze(3), v.squeeze(3)
        if self.qk_norm is not None:
            q, k = norm_heads(self.qk_norm, q), norm_heads(self.qk_norm, k)
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        past = 0
        if context.cache is not None:
            past = context.cache.length
            k, v = context.cache.update(layer, k, v)
        drop = None
        if context.dropout is not None and self.dropout > 0:

            def drop(probabilities: Tensor) -> Tensor:
                return dropout(probabilities, self.dropout, context.dropout, "probabilities", layer)

        y = attend(q, k, v, past, context.bias, drop)
        return self.out(y.transpose(1, 2).reshape(B, S, self.n * self.d))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: int = 0,
    bias: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v under the causal mask: the one place that picks attention kernels.

    Fused kernels round a bias to q's dtype; in bf16 that moves a probability by less than the
    rounding of the probability itself. They cannot drop by our counters, so dropout is computed
    step by step, softmax in fp32.

    Args:
        q: `[B, n, S, d]`; k, v: `[B, k, past + S, d]`.
        past: keys before the first query's own.
        bias: `[1 or B, n, S, past + S]`, the causal mask included.
        drop: applied to the probabilities `[B, n, S, past + S]`.

    Returns:
        `[B, n, S, d]`.
    """
    grouped = q.shape[1] != k.shape[1]
    if drop is not None:
        if bias is None:
            bias = causal(torch.zeros(q.shape[2], k.shape[2], device=q.device), past)
        if grouped:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = wide(q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1]) + bias
        return drop(scores.softmax(-1)).to(v.dtype) @ v
    if bias is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), enable_gqa=grouped)
    if past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask, new = None, q.shape[2]
    if new > 1:
        mask = torch.ones(new, past + new, dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


class MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) for gated activations (Shazeer 2020)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.activation = look_up(ACTIVATIONS, cfg.activation, "model.activation")
        self.gate = Linear(cfg.hidden_size, cfg.mlp_size, bias=cfg.mlp_bias) if cfg.gated else None
        self.up = Linear(cfg.hidden_size, cfg.mlp_size, bias=cfg.mlp_bias)
        self.down = Linear(cfg.mlp_size, cfg.hidden_size, bias=cfg.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, h]` to `[B, S, h]`."""
        up = self.up(x)
        inner = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        return self.down(inner)
