"""Positions -> what a model adds to its embeddings, rotates by, or adds to its attention scores.

    rotary               cos, sin of the angles, for queries and keys      Su et al. 2021
    sinusoidal           a vector per position                             Vaswani et al. 2017
    rpe                  a bias per head and class of distance             Raffel et al. 2020 (T5)
    alibi                a bias per head, linear in the distance           Press et al. 2022
    learned              a table: nothing to compute

Rotary frequencies may be lowered for longer sequences (`RopeScaling`); a kind that depends on the
length of the sequence at hand ("dynamic") is not among them, for the reason that follows.

Everything is a function of the position ids it is given, never of a tensor's length, so that
generation with a cache computes what a whole forward pass computes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from castalia.config import ModelConfig
from castalia.model.norms import wide


class RopeScaling(NamedTuple):
    """How rotary frequencies are lowered; see `scaled_frequencies`."""

    kind: str
    factor: float
    length: int
    low: float
    high: float


def rope_scaling(cfg: ModelConfig) -> RopeScaling | None:
    """What the configuration says; None: the frequencies stay."""
    if cfg.rotary_scaling == "none":
        return None
    return RopeScaling(
        cfg.rotary_scaling, cfg.rotary_scaling_factor, cfg.rotary_original_length or 1, *cfg.rotary_turns
    )


def scaled_frequencies(frequencies: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies `[r/2]` lowered by up to `factor`.

    linear   all of them (position interpolation, Chen et al. 2023)
    llama3   by how many turns a frequency makes in the original length: in full below `low`, not at all
             above `high`, in between linearly in the number of turns (Grattafiori et al. 2024)
    yarn     the same, but in between linearly in the frequency's number, between whole numbers (Peng et al. 2023)
    """
    lowered = frequencies / scaling.factor
    if scaling.kind == "linear":
        return lowered
    if scaling.kind == "llama3":
        turns = scaling.length * frequencies / (2 * math.pi)
        keep = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    else:
        count = len(frequencies)

        def number(turns: float) -> float:
            """Which frequency makes so many turns."""
            return count * math.log(scaling.length / (turns * 2 * math.pi)) / math.log(base)

        first = max(math.floor(number(scaling.high)), 0)
        last = min(math.ceil(number(scaling.low)), 2 * count - 1)
        index = torch.arange(count, device=frequencies.device, dtype=frequencies.dtype)
        keep = 1 - ((index - first) / max(last - first, 1e-3)).clamp(0, 1)
    return lowered * (1 - keep) + frequencies * keep


def rotary_angles(
    positions: Tensor, rotary_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, in fp32.

    Args:
        positions: integer positions, `[S]` or `[B, S]`.
        rotary_dim: r, even.
        base: theta; frequency j is base^(-2j/r).
        scaling: how frequencies are lowered; YaRN's kind also makes all scores larger, by
            (0.1 ln factor + 1)^2, which cos and sin of queries and keys share.

    Returns:
        cos and sin, each `positions.shape + [r/2]`.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    frequencies = 1.0 / base**exponent
    if scaling is not None:
        frequencies = scaled_frequencies(frequencies, base, scaling)
    angles = positions.float().unsqueeze(-1) * frequencies
    if scaling is None or scaling.kind != "yarn":
        return angles.cos(), angles.sin()
    size = 0.1 * math.log(scaling.factor) + 1
    return size * angles.cos(), size * angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r dimensions of each head, halves against each other (GPT-NeoX's and Llama's way).

    Args:
        x: `[B, S, heads, d]`.
        cos, sin: `[S, 1, r/2]` or `[B, S, 1, r/2]`, fp32.

    Returns:
        The same shape and dtype; the dimensions from r on are unchanged.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _rotated(x, cos, sin)
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


class _Rotate(torch.autograd.Function):
    """Backward is the rotation back, in one pass; autograd would put each slice's gradient into zeros of full size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = wide(x[..., :half]), wide(x[..., half : 2 * half])
    parts = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    if x.shape[-1] > 2 * half:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, -1)


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """[sin(p t_j) | cos(p t_j)], t_j = 10000^(-2j/h), j < h/2: fp32 `positions.shape + [h]`, h even.

    Sines and cosines lie in two halves, as in GPT-NeoX; Vaswani et al. interleave them.
    """
    cos, sin = rotary_angles(positions, size, 10000.0)
    return torch.cat([sin, cos], -1)


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head: 2^(-8k/n) for k = 1..n, n a power of two.

    Otherwise those of the largest power of two below, then every other one of twice that power.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * k / power) for k in range(1, power + 1)]
    return slopes + [2.0 ** (-8 * k / (2 * power)) for k in range(1, 2 * (heads - power), 2)]


def alibi_bias(distance: Tensor, slopes: Tensor) -> Tensor:
    """-slope x distance: integer `[..., S, T]` and fp32 `[n]` to fp32 `[..., n, S, T]`."""
    return -slopes.view(-1, 1, 1) * distance.float().unsqueeze(-3)


def distance_buckets(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """T5's causal classes of distance, int64 of the same shape.

    Half of the buckets are for the distances 0, 1, 2, ...; the others for ranges that grow
    geometrically up to `furthest`, from which on all distances share the last one.
    """
    distance = distance.clamp(min=0)
    exact = buckets // 2
    grown = (distance.float().clamp(min=exact) / exact).log() / math.log(furthest / exact)
    far = exact + (grown * (buckets - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


def relative_bias(distance: Tensor, table: Tensor, furthest: int, head_size: float) -> Tensor:
    """sqrt(d) table[bucket, head]: integer `[..., S, T]` and `[buckets, n]` to `[..., n, S, T]`.

    The root of the head size, which T5 has not, is GPT-NeoX's: scores are scaled, the bias is scaled back.
    """
    entries = wide(table)[distance_buckets(distance, table.shape[0], furthest)]
    return math.sqrt(head_size) * entries.movedim(-1, -3)


def causal(bias: Tensor, past: int) -> Tensor:
    """`[..., S, T]` with -inf wherever key j comes after query i, which is the token number past + i."""
    later = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(past + 1)
    return bias.masked_fill(later, -math.inf)
