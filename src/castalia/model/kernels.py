"""The one place that decides which kernels a device gets.

On CPUs, torch sends fp32 matrix products to MKL, which on AMD runs at half of what oneDNN
reaches. The matmul precision "medium" sends them to oneDNN; on CPUs without native low
precision for fp32 inputs the arithmetic stays fp32. Whether it does is tried, not assumed,
and the trial looks at values, never at times: a choice by timing could differ after a
restart, and a resumed run would no longer be bit-equal.

Numbers too small for a normal float are taken for 0 on CPUs: arithmetic on them is many times
slower, and biases that grow with the distance (ALiBi's) make them by the million.
"""

from __future__ import annotations

import torch

# An fp32 product of 256 terms errs by about 3e-7; one with bf16 inputs by about 3e-3.
_FP32_ERROR = 5e-6


def flushes_denormals() -> bool:
    """Whether this thread takes numbers below the normal ones for 0; torch sets it, but does not tell."""
    return bool(torch.tensor(1e-40).mul(1.0).eq(0.0))


def choose_fp32_matmul(device: torch.device) -> str:
    """Set torch's fp32 matmul precision for `device` and return its name.

    "medium" on a CPU where that is still fp32 arithmetic, else "highest". GPUs keep
    "highest" too: there, "medium" would mean TF32 or bf16.
    """
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)
    if device.type != "cpu":
        return "highest"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    error = ((a @ b).double() - exact).norm() / exact.norm()
    if error > _FP32_ERROR:
        torch.set_float32_matmul_precision("highest")
    return torch.get_float32_matmul_precision()
