"""Norms: [..., h] in any dtype -> fp32 [..., h], each a few lines, named in YAML by `model.norm`.

    layernorm                  (x - mean) / sqrt(var + eps) * weight + bias     Ba et al. 2016
    non_parametric_layernorm   the same without weight and bias
    rmsnorm                    x / sqrt(mean(x^2) + eps) * weight               Zhang & Sennrich 2019
    rmsnorm_eps_outside        x / (sqrt(mean(x^2)) + eps) * weight             as GPT-NeoX v2.0 has it
    scalenorm                  x / max(|x|, eps) * weight, one number           Nguyen & Salazar 2019

Which parameters a norm has is said once, in `NORM_PARAMETERS` of size.py; a test holds the
two together. Only an fp64 model computes in fp64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.config import ModelConfig
from castalia.model.registry import NORMS, look_up, register


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


@register(NORMS, "layernorm")
class LayerNorm(nn.LayerNorm):
    """Layer normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to fp32 `[..., h]`."""
        return F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps)


@register(NORMS, "non_parametric_layernorm")
class NonParametricLayerNorm(nn.Module):
    """Layer normalisation without gain and bias."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.size, self.epsilon = size, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to fp32 `[..., h]`."""
        return F.layer_norm(wide(x), (self.size,), eps=self.epsilon)


class _Scaled(nn.Module):
    """What the norms without a mean share: a gain, and statistics over the last dimension alone."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def gain(self, x: Tensor) -> Tensor:
        """The gain for `[..., h]`, or for `[..., heads, d]` where heads d = h."""
        weight = wide(self.weight)
        return weight if weight.numel() in (1, x.shape[-1]) else weight.view(x.shape[-2:])


@register(NORMS, "rmsnorm")
class RMSNorm(_Scaled):
    """Root-mean-square normalisation, epsilon inside the root."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to fp32 `[..., h]`."""
        gain = self.gain(x)
        if gain.ndim == 1:
            return F.rms_norm(wide(x), gain.shape, gain, self.epsilon)
        return F.rms_norm(wide(x), gain.shape[-1:], None, self.epsilon) * gain


@register(NORMS, "rmsnorm_eps_outside")
class RMSNormEpsOutside(_Scaled):
    """Root-mean-square normalisation with epsilon added to the root, for files of GPT-NeoX v2.0."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to fp32 `[..., h]`."""
        x = wide(x)
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x / (root + self.epsilon) * self.gain(x)


@register(NORMS, "scalenorm")
class ScaleNorm(_Scaled):
    """Unit length times one trained number."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__(1, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to fp32 `[..., h]`."""
        x = wide(x)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / length.clamp(min=self.epsilon) * self.gain(x)


def make_norm(cfg: ModelConfig, size: int | None = None) -> nn.Module:
    """The norm that the configuration names, over `size` (the hidden size if not given)."""
    norm: nn.Module = look_up(NORMS, cfg.norm, "model.norm")(size or cfg.hidden_size, cfg.norm_epsilon)
    return norm


def norm_heads(norm: nn.Module, x: Tensor) -> Tensor:
    """Query-key normalisation: `[..., n, d]` to the same shape and dtype, by a norm made for n d.

    The norms without a mean take each head alone; the layer norms take a token's heads together,
    mean and variance over n d numbers. That is GPT-NeoX's `use_qk_layernorm` on one tensor-parallel
    rank: its norm is given the shape [n, d], over which a layer norm normalises as a whole, and an
    RMSNorm over the last dimension.
    """
    y = norm(x) if isinstance(norm, _Scaled) else norm(x.flatten(-2)).view_as(x)
    return y.to(x.dtype)


def norm_queries(norm: nn.Module, x: Tensor, per_head: bool) -> Tensor:
    """Normalise queries or keys `[..., n, d]`, each head alone or all heads of a token together; same dtype."""
    y: Tensor = norm(x) if per_head else norm(x.flatten(-2)).view_as(x)
    return y.to(x.dtype)
