"""Linear maps whose matrix products read 8-bit floats: `training.precision: fp8`.

    forward   x [.., in] ─e4m3─┐                    backward  dy ─e5m2─┬─ W e4m3 ──> dx
                               ├─ _scaled_mm ─> y                      └─ x e4m3 ──> dW
              W [out, in] e4m3─┘

Forward operands have three bits of mantissa, gradients two and more range (Micikevicius et al.
2022). Each tensor is divided by a scale of its own, so that its largest number is the format's largest;
the scale is taken anew each time and not from earlier steps. Products are summed in fp32 and leave in
the dtype of the given weight (bf16). Biases, norms, attention, experts, embedding and head are
as in bf16. Under tensor parallelism each rank scales its own part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.model.layers import Linear

FORWARD = torch.float8_e4m3fn
BACKWARD = torch.float8_e5m2
_MULTIPLE = 16  # of the sizes of what GPUs multiply


def use_float8(model: nn.Module) -> None:
    """Let every `Linear` of a model compute its products in float8."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.product = float8_product


def float8_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with operands rounded to float8.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`.

    Returns:
        `[..., out]` of the weight's dtype.
    """
    out: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]).to(weight.dtype), weight)
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(weight.dtype)


def missing_float8(device: torch.device) -> str | None:
    """Why a device cannot multiply float8 matrices, in torch's words; None if it can. It is tried."""
    try:
        a, b = (torch.ones(_MULTIPLE, _MULTIPLE, device=device, dtype=torch.bfloat16) for _ in range(2))
        for first in (FORWARD, BACKWARD):
            multiply(*rounded(a, first), *rounded(b, FORWARD), torch.bfloat16)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor in float8, and the fp32 number that it is to be multiplied by."""
    most = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / most).clamp(min=torch.finfo(torch.float32).tiny)
    # The largest may be rounded beyond the format's end. What is not finite stays so.
    return (x.float() / scale).clamp(-most, most).to(dtype), scale


def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a b^T of float8 matrices `[m, k]` and `[n, k]`, times their scales: `[m, n]` in `dtype`."""
    rows = b.shape[0]
    deep, wide = -a.shape[1] % _MULTIPLE, -rows % _MULTIPLE
    if deep or wide:  # zeros add nothing
        a, b = _padded(a, deep, 0), _padded(b, deep, wide)
    out = torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype)
    return out[:, :rows] if wide else out


def _padded(x: Tensor, columns: int, rows: int) -> Tensor:
    return F.pad(x.view(torch.uint8), (0, columns, 0, rows)).view(x.dtype)  # the byte 0 is the number 0


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = rounded(x, FORWARD)
        w8, w_scale = rounded(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtype = weight.dtype
        return multiply(x8, x_scale, w8, w_scale, ctx.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        dy8, dy_scale = rounded(dy, BACKWARD)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = multiply(dy8, dy_scale, w8.t().contiguous(), w_scale, ctx.dtype)
        if ctx.needs_input_grad[1]:
            dw = multiply(dy8.t().contiguous(), dy_scale, x8.t().contiguous(), x_scale, ctx.dtype)
        return dx, dw
