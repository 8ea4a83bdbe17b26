"""The parts of a block: linear maps, norms, rotary positions, attention, MLP.

Precision follows the weights that a forward pass is given, not a global mode: a matrix
product runs in the dtype of its matrix (so bf16 working copies give bf16 products), while
norms, softmax statistics and the residual stream stay fp32. The same code therefore runs
under kept bf16 copies, under FSDP2's mixed precision, and in plain fp32.

Shape letters: B batch, S sequence, h hidden, n query heads, k key/value heads, g = n / k,
d head size, r rotated dimensions of a head.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.config import ModelConfig
from castalia.model.registry import ACTIVATIONS, NORMS, look_up, register


class Cache(Protocol):
    """Keys and values of earlier tokens, for generation."""

    length: int

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `[B, k, S, d]` of the new tokens; return all of them, `[B, k, length + S, d]`."""
        ...


class Linear(nn.Linear):
    """y = x W^T + b in W's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` of any dtype to `[..., out]` of the weight's dtype."""
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


@register(NORMS, "layernorm")
class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to fp32 `[..., h]`."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


@register(NORMS, "rmsnorm")
class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation (Zhang & Sennrich 2019) in fp32, epsilon inside the root."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to fp32 `[..., h]`."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


def make_norm(cfg: ModelConfig) -> nn.Module:
    """The norm that the configuration names, over the hidden dimension."""
    norm: nn.Module = look_up(NORMS, cfg.norm, "model.norm")(cfg.hidden_size, cfg.norm_epsilon)
    return norm


def rotary_angles(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al. 2021), in fp32.

    Args:
        positions: integer positions, `[S]` or `[B, S]`.
        rotary_dim: r, even.
        base: theta; frequency j is base^(-2j/r).

    Returns:
        cos and sin, each `positions.shape + [r/2]`.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / base**exponent)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r dimensions of each head, halves against each other (GPT-NeoX's and Llama's way).

    Args:
        x: `[B, S, heads, d]`.
        cos, sin: `[S, 1, r/2]` or `[B, S, 1, r/2]`, fp32.

    Returns:
        The same shape and dtype; the dimensions from r on are unchanged.
    """
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    parts = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    if x.shape[-1] > 2 * half:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, -1)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023).

    The rows of `qkv` are grouped per key/value head (its g query heads, its key, its value),
    so that a contiguous cut serves tensor parallelism; with k = n this is GPT-NeoX's order.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n, self.k, self.d = cfg.num_attention_heads, cfg.kv_heads, cfg.head_size
        self.qkv = Linear(cfg.hidden_size, (self.n + 2 * self.k) * self.d, bias=cfg.attention_bias)
        self.out = Linear(self.n * self.d, cfg.hidden_size, bias=cfg.attention_bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        """`[B, S, h]` to `[B, S, h]`; `rotary` as `rotate` wants it, None for no positions."""
        B, S, _ = x.shape
        group = self.n // self.k
        rows = self.qkv(x).view(B, S, self.k, group + 2, self.d)
        q, k, v = rows.split([group, 1, 1], 3)
        q, k, v = q.reshape(B, S, self.n, self.d), k.squeeze(3), v.squeeze(3)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = attend(q, k, v, self.layer, cache)
        return self.out(y.transpose(1, 2).reshape(B, S, self.n * self.d))


def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = 0, cache: Cache | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v under the causal mask.

    Args:
        q: `[B, n, S, d]`; k, v: `[B, k, S, d]`, of the new tokens only.
        layer: which layer of the cache.
        cache: earlier keys and values; query i then sees keys up to cache.length + i.

    Returns:
        `[B, n, S, d]`.
    """
    grouped = q.shape[1] != k.shape[1]
    if cache is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    past, new = cache.length, q.shape[2]
    k, v = cache.update(layer, k, v)
    if past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask = None
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
