"""Matrices -> the form in which this device multiplies few rows quickest; the one place that chooses it.

    bf16 on a CPU     oneDNN's own blocked layout, made once: 1.8 times as quick for 1 to 8 rows, the same bits
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

from castalia.model.layers import Linear

M = TypeVar("M", bound=nn.Module)
# torch's int8 kernel takes the rows one by one: beyond so many, turning the weights back into bf16 first is quicker.
_FEW_ROWS = 16


class PackedLinear(nn.Module):
    """y = x W^T + b in bf16, W in oneDNN's layout.

    Args:
        weight: bf16 `[out, in]` on a CPU.
        bias: `[out]`, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # Plain attributes: a tensor in oneDNN's layout has no storage to be moved, cast or saved by.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = None if bias is None else bias.detach().to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` of any dtype to bf16 `[..., out]`."""
        x = x.to(torch.bfloat16)
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], ""))


class Int8Linear(nn.Module):
    """y = s (x q^T) + b: weights rounded to 8 bits, symmetrically, with a scale for each row.

    Args:
        weight: `[out, in]`; row i becomes round(w / s_i), s_i = max |w_i| / 127.
        bias: `[out]`, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        wide = weight.detach().float()
        # The scale is rounded first, so that q fits the scale that is really used.
        scale = (wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127).bfloat16()
        self.q = (wide / scale.float()).round().clamp(-127, 127).to(torch.int8)
        self.scale = scale.squeeze(1)
        self.bias = None if bias is None else bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` of any dtype to bf16 `[..., out]`."""
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
        if rows.shape[0] <= _FEW_ROWS and rows.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows, self.q, self.scale)
        else:
            y = F.linear(rows, self.q.to(torch.bfloat16)) * self.scale
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def linear_of(weight: Tensor, bias: Tensor | None, int8: bool = False) -> nn.Module | None:
    """The quick form of a matrix; None where the one that it has is best."""
    if int8:
        return Int8Linear(weight, bias)
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        return PackedLinear(weight, bias)
    return None


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
