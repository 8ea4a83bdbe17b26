"""Fast paths of GPUs: the mask's description -> FlexAttention, or flash attention of variable lengths.

FlexAttention compiles a kernel from two small functions, which key a query sees and what is added to
its score, and skips the blocks of keys that none of a block's queries sees. Documents without further
pattern, in 16 bits, go to flash attention with all documents of the batch in one row.

Both compute what `attend` computes otherwise; `tests/model/test_attention_flex.py` holds the two
functions against it on a CPU, where FlexAttention has a forward but no backward. On GPUs they have
not been run by this project's tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from castalia.model.attention_mask import Drop, MaskSpec
from castalia.model.positions import distance_buckets

DEVICES = ("cuda", "xpu")
"""Where FlexAttention has a backward; ROCm counts as cuda."""


def serves(q: Tensor, drop: Drop | None) -> bool:
    """Whether `flexible_attention` can do it here: it cannot drop by our counters."""
    return q.device.type in DEVICES and drop is None


def flexible_attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float | None = None) -> Tensor:
    """Attention by the kernels of GPUs; the arguments are those of `castalia.model.attention.attend`."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    whole = mask.past == 0 and q.shape[2] == k.shape[2]
    plain = mask.documents is not None and mask.layout is None and mask.bias is None
    if q.device.type == "cuda" and half and plain and whole:
        return _variable_lengths(q, k, v, mask, scale)
    key = f"flex/{q.shape[1]}/{q.shape[2]}/{k.shape[2]}"
    if key not in mask.memo:
        sees = mask_mod(mask, k.shape[2], q.device)
        batch = None if mask.documents is None else q.shape[0]
        mask.memo[key] = flex.create_block_mask(sees, batch, q.shape[1], q.shape[2], k.shape[2], q.device)
    # Inside a compiled model the call is compiled with it.
    attention = flex.flex_attention if torch.compiler.is_compiling() or q.device.type == "cpu" else _compiled()
    out: Tensor = attention(q, k, v, score_mod(mask), mask.memo[key], scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


@cache
def _compiled() -> Any:
    """FlexAttention uncompiled would build all scores."""
    return torch.compile(flex.flex_attention, dynamic=False)


def mask_mod(mask: MaskSpec, keys: int, device: torch.device) -> Any:
    """(batch, head, query, key) -> whether the query sees the key."""
    starts = None if mask.documents is None else mask.documents.starts
    live = None if mask.layout is None else mask.layout.live(keys).to(device)
    block = 1 if mask.layout is None else mask.layout.block

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        i, j = query + mask.past, key
        seen = j <= i
        if mask.window is not None:
            seen = seen & (i - j < mask.window)
        if starts is not None:
            seen = seen & (starts[b, i] == starts[b, j])
            i, j = i - starts[b, i], j - starts[b, j]
        if live is not None:
            seen = seen & live[h if live.shape[0] > 1 else 0, i // block, j // block]
        return seen

    return sees


def score_mod(mask: MaskSpec) -> Any:
    """(score, batch, head, query, key) -> the score with the bias of positions; None where there is none."""
    bias = mask.bias
    if bias is None:
        return None

    def add(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row_q, row_k = (b if positions.shape[0] > 1 else 0 for positions in (bias.queries, bias.keys))
        distance = bias.queries[row_q, query] - bias.keys[row_k, key]
        if bias.table is None:
            assert bias.slopes is not None
            return score - bias.slopes[h] * distance
        bucket = distance_buckets(distance, bias.table.shape[0], bias.furthest)
        return score + bias.head_size**0.5 * bias.table[bucket, h]

    return add


def _variable_lengths(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float | None) -> Tensor:
    """Documents, at most with a window: one row of all tokens, cut at the documents' first tokens."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, length, size = q.shape
    if "cuts" not in mask.memo:
        assert mask.documents is not None
        first = mask.documents.starts == torch.arange(length, device=q.device)
        cuts = first.flatten().nonzero().squeeze(1)  # once a forward pass this waits for the device
        mask.memo["cuts"] = torch.cat([cuts, cuts.new_tensor([batch * length])]).int()
    cuts = mask.memo["cuts"]
    q, k, v = (t.transpose(1, 2).reshape(batch * length, t.shape[1], size) for t in (q, k, v))
    window = (-1 if mask.window is None else mask.window - 1, 0)
    out: Any = varlen_attn(
        q, k, v, cuts, cuts, length, length, scale=scale, window_size=window, enable_gqa=heads != k.shape[1]
    )
    return out.view(batch, length, heads, size).transpose(1, 2)
