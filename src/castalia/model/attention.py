"""Causal self-attention: hidden states -> queries, keys and values -> a core -> hidden states.

    x [B,S,h] ─qkv─> q [B,n,S,d], k, v [B,k,T,d] ──core(q, k, v, mask)──> [B,n,S,d] ─out─> [B,S,h]

The module knows parameters, positions and the cache. What a token sees is in the mask's description
(`attention_mask.py`), and how that is computed is the core's business, so a core can be exchanged: by
name in the configuration, or by setting `core` on the modules, as a plan does that spreads a
sequence over ranks. `attend` is the core for one device and the one place that picks kernels:

    dense       short sequences, one step of generation: torch's kernels with the mask as a matrix
    causal      nothing but causality: the same kernels skip the upper triangle by themselves
    tiles       windows, live blocks, documents, biases on CPUs: attention_tiles.py
    flex        the same on GPUs: attention_flex.py
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.config import ModelConfig, mup
from castalia.model.attention_flex import flexible_attention, serves
from castalia.model.attention_mask import Drop, MaskSpec
from castalia.model.attention_tiles import tiled_attention
from castalia.model.layers import Context, Linear
from castalia.model.norms import make_norm, norm_heads, norm_queries, wide
from castalia.model.positions import rotate
from castalia.model.registry import CORES, look_up, register


class Core(Protocol):
    """What computes attention."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, drop: Drop | None = None, scale: float | None = None
    ) -> Tensor:
        """softmax(q k^T scale + bias) v over the keys that the mask lets each query see.

        Args:
            q: `[B, n, S, d]`; k, v: `[B, k, T, d]`, T = mask.past + S, in the same dtype; n/k query heads
                in a row share a key/value head.
            mask: what is to be seen.
            drop: applied to the probabilities; None: no dropout.
            scale: of the scores; None: 1 / sqrt(d).

        Returns:
            `[B, n, S, d]` in q's dtype.
        """
        ...


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023).

    The rows of `qkv` are grouped per key/value head (its g query heads, its key, its value),
    so that a contiguous cut serves tensor parallelism; with k = n this is GPT-NeoX's order.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.n, self.k, self.d = cfg.num_attention_heads, cfg.kv_heads, cfg.head_size
        self.dropout, self.scale = cfg.attention_dropout, mup.attention_scale(cfg)
        self.core: Core = look_up(CORES, cfg.attention_core, "model.attention_core")
        self.qkv = Linear(cfg.hidden_size, (self.n + 2 * self.k) * self.d, bias=cfg.attention_bias)
        self.qk_norm = make_norm(cfg, self.n * self.d) if cfg.qk_norm is True else None
        self.q_norm = self.k_norm = None
        self.per_head = cfg.qk_norm == "head"
        if isinstance(cfg.qk_norm, str):
            self.q_norm, self.k_norm = (make_norm(cfg, self.d * (1 if self.per_head else m)) for m in (self.n, self.k))
        self.out = Linear(self.n * self.d, cfg.hidden_size, bias=cfg.attention_bias and cfg.attention_out_bias)

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """`[B, S, h]` to `[B, S, h]`; `layer` is the number of the executed layer."""
        B, S, _ = x.shape
        group = self.n // self.k
        rows = self.qkv(x).view(B, S, self.k, group + 2, self.d)
        q, k, v = rows.split([group, 1, 1], 3)
        q, k, v = q.reshape(B, S, self.n, self.d), k.squeeze(3), v.squeeze(3)
        if self.qk_norm is not None:
            q, k = norm_heads(self.qk_norm, q), norm_heads(self.qk_norm, k)
        elif self.q_norm is not None and self.k_norm is not None:
            q, k = norm_queries(self.q_norm, q, self.per_head), norm_queries(self.k_norm, k, self.per_head)
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if context.cache is not None:
            k, v = context.cache.update(layer, k, v)
        drop = None
        if context.dropout is not None and self.dropout > 0:
            drop = Drop(context.dropout, self.dropout, layer, k.shape[2])
        y = self.core(q, k, v, context.mask(layer), drop, self.scale)
        return self.out(y.transpose(1, 2).reshape(B, S, self.n * self.d))


@register(CORES, "sdpa")
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, drop: Drop | None = None, scale: float | None = None
) -> Tensor:
    """The core for one device: see `Core`.

    Fused kernels round a bias to q's dtype; in bf16 that moves a probability by less than the
    rounding of the probability itself. They cannot drop by our counters, so dropout is computed
    step by step, softmax in fp32.
    """
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    dense, plain = mask.dense, mask.plain(keys)
    if dense is None and drop is None and plain and (mask.past == 0 or queries == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, scale=scale, enable_gqa=grouped)
    if dense is None and mask.better_dense(queries, keys):
        dense = mask.matrix(queries, keys, q.device)
    if dense is None:
        if serves(q, drop):
            return flexible_attention(q, k, v, mask, scale)
        return tiled_attention(q, k, v, mask, drop, scale)
    if drop is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense.to(q.dtype), scale=scale, enable_gqa=grouped)
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = wide(q @ k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1])) + dense
    everything, rows = slice(None), torch.arange(mask.past, keys, device=q.device)
    probabilities = drop(scores.softmax(-1), everything, everything, rows, torch.arange(keys, device=q.device))
    return probabilities.to(v.dtype) @ v
