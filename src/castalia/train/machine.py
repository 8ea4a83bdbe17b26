"""This machine -> the matrix rate it really reaches, in FLOP/s.

Model FLOP utilisation needs a denominator. A data sheet's peak is out of reach for reasons
that are nobody's fault, and unknown for most CPUs, so the rate is measured: a square
product through `F.linear`, the same path and the same settings (threads, matmul precision)
as the model's own layers.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

SIZES = (1024, 1536, 2048)


def measure_matmul_flops(
    dtype: torch.dtype, seconds: float = 0.5, device: torch.device | str = "cpu", sizes: tuple[int, ...] = SIZES
) -> float:
    """Rate of square matrix products `[n, n] x [n, n]`.

    Each size is repeated for its share of `seconds` and its median kept, since a busy machine makes
    outliers in one direction only; the answer is the median over the sizes, so that no size that
    happens to suit the kernels decides it.

    Args:
        dtype: of both operands.
        seconds: time to spend, shared by the sizes; at least three products of each size run.
        device: where to measure.
        sizes: the values of n.

    Returns:
        FLOP per second, a multiply-add counted as two.
    """
    generator = torch.Generator().manual_seed(0)
    rates = []
    for n in sizes:
        x = torch.randn(n, n, generator=generator).to(device, dtype)
        weight = torch.randn(n, n, generator=generator).to(device, dtype)
        _timed(x, weight)  # the first product also plans and allocates
        times: list[float] = []
        end = time.perf_counter() + seconds / len(sizes)
        while len(times) < 3 or time.perf_counter() < end:
            times.append(_timed(x, weight))
        rates.append(2 * n**3 / statistics.median(times))
    return statistics.median(rates)


@torch.inference_mode()
def _timed(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Seconds of one `F.linear(x, weight)`, waiting for the device to finish."""
    start = time.perf_counter()
    F.linear(x, weight)
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
    return time.perf_counter() - start
