"""Matrices -> the form in which this device multiplies few rows quickest; the one place that chooses it.

    bf16 on a CPU     oneDNN's own blocked layout, made once, with the activation in the product; many rows in
                      fp32 where that is quicker, as in training (`castalia.model.kernels`)
    fp32              as they are: for one row, the bandwidth of the memory is reached already
    int8              one scale per output row, w ~ q s: half the bytes of bf16; activations are bf16

A decoding step multiplies one row per sequence, so nothing but reading the weights takes time, and a
kernel that has to rearrange them at every call loses half. Layers are replaced in a copy of the tree
of modules that shares everything else, so the model that was given stays as it is.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.model.kernels import choose_matmul
from castalia.model.layers import MLP, Linear
from castalia.model.registry import ACTIVATIONS

M = TypeVar("M", bound=nn.Module)
# From so many rows on, turning the matrix back and multiplying in fp32 is the quicker way where the device's fp32
# products are ("fp32" of `choose_matmul`): 1.5 times at 512 rows on a CPU with AVX-512 and without AMX, equal at 128.
_MANY_ROWS = 256
# torch's int8 kernel takes the rows one by one: beyond so many, widening the weights first is quicker, on that CPU.
_FEW_ROWS = 16
# What oneDNN applies to a product before it is rounded: name there, and the variant.
_AFTER = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", ""), "silu": ("swish", "")}


class PackedLinear(nn.Module):
    """y = x W^T + b in bf16, W in oneDNN's layout; activation(y), if there is one.

    Args:
        weight: bf16 `[out, in]` on a CPU.
        bias: `[out]`, or None.
        wide: multiply many rows in fp32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, wide: bool = False) -> None:
        super().__init__()
        # Plain attributes: a tensor in oneDNN's layout has no storage to be moved, cast or saved by.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = None if bias is None else bias.detach().to(weight.dtype)
        self.wide, self.activation = wide, ""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` of any dtype to bf16 `[..., out]`."""
        x = x.to(torch.bfloat16)
        if self.wide and x.numel() >= _MANY_ROWS * x.shape[-1]:
            bias = None if self.bias is None else self.bias.float()
            y = F.linear(x.float(), self.packed.to_dense(torch.float32), bias).bfloat16()
            return ACTIVATIONS[self.activation](y) if self.activation else y
        name, variant = _AFTER.get(self.activation, ("none", ""))
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], variant))


class Int8Linear(nn.Module):
    """y = s (x q^T) + b: weights rounded to 8 bits, symmetrically, with a scale for each row.

    Args:
        weight: `[out, in]`; row i becomes round(w / s_i), s_i = max |w_i| / 127.
        bias: `[out]`, or None.
        wide: multiply many rows in fp32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, wide: bool = False) -> None:
        super().__init__()
        self.dtype = torch.float32 if wide else torch.bfloat16
        wide_weight = weight.detach().float()
        # The scale is rounded first, so that q fits the scale that is really used.
        scale = (wide_weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127).bfloat16()
        self.q = (wide_weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
        self.scale = scale.squeeze(1)
        self.bias = None if bias is None else bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` of any dtype to bf16 `[..., out]`."""
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
        if rows.shape[0] <= _FEW_ROWS and rows.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows, self.q, self.scale)
        else:
            y = (F.linear(rows.to(self.dtype), self.q.to(self.dtype)) * self.scale).bfloat16()
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def linear_of(weight: Tensor, bias: Tensor | None, int8: bool = False) -> nn.Module | None:
    """The quick form of a matrix; None where the one that it has is best."""
    packs = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    if not int8 and not packs:
        return None
    wide = choose_matmul(weight.device, torch.bfloat16) == "fp32"
    return Int8Linear(weight, bias, wide) if int8 else PackedLinear(weight, bias, wide)


def shared_copy(module: M) -> M:
    """A tree of modules of its own, with the same parameters: children can be replaced in it."""
    new = copy.copy(module)
    children: dict[str, Any] = {k: None if c is None else shared_copy(c) for k, c in module._modules.items()}
    new._modules = children
    return new


def replace_linears(module: nn.Module, int8: bool = False) -> None:
    """Give every linear map of the blocks its quick form, in place; other modules stay."""
    for name, child in module.named_children():
        if type(child) is Linear:
            new = linear_of(child.weight, child.bias, int8)
            if new is not None:
                setattr(module, name, new)
        else:
            replace_linears(child, int8)
    up = getattr(module, "up", None)
    if type(module) is MLP and module.gate is None and isinstance(up, PackedLinear):
        known = [name for name in _AFTER if ACTIVATIONS[name] is module.activation]
        if known:  # within the product, before it is rounded
            up.activation, module.activation = known[0], _same


def _same(x: Tensor) -> Tensor:
    return x
