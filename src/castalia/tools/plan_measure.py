"""This machine -> its description for `castalia plan --machine`, measured in a minute.

    one process for each accelerator, or for each CPU core: all at once, as a job would
      matrix products ─> flops      attention ─> achieved.attention     a copy ─> memory_bandwidth
      norm, activation, sum ─> achieved.memory      all-reduce, large and tiny ─> links

Medians are kept, since a busy machine makes outliers in one direction. What is measured is what is reached, so the
shares of products and links are 1. Links between nodes cannot be measured from one: they are taken for those within,
and are yours to correct in the file.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from castalia.parallel.layout import Layout
from castalia.parallel.mesh import Mesh
from castalia.parallel.testing import run_in_processes
from castalia.parallel.world import World, device_memory, local_devices
from castalia.train.machine import measure_matmul_flops
from castalia.train.preflight import memory_bytes

_LARGE, _TINY = 1 << 22, 1  # elements of an all-reduce


def measure() -> dict[str, Any]:
    """The values of a machine's description; bytes, seconds, FLOP/s."""
    accelerator = torch.accelerator.is_available()
    count = local_devices() if accelerator else _cores()
    found = run_in_processes(count, _measure_rank, joined=count > 1, timeout=300.0)
    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
    memory, host = _memory(count, accelerator)
    precisions = {p: middle[p] for p in ("fp32", "bf16", "fp16") if p in middle}
    return {
        "version": 1,
        "name": f"{platform.node()}, {count} {'accelerators' if accelerator else 'CPU cores'}",
        "kind": "accelerator" if accelerator else "cpu",
        "devices_per_node": count,
        "memory": memory,
        "flops": precisions,
        "memory_bandwidth": middle["copy"],
        "links": {
            "within": middle["link"],
            "between": middle["link"],
            "within_latency": middle["latency"],
            "between_latency": middle["latency"],
        },
        "achieved": {
            "matmul": 1.0,
            "attention": min(middle["attention"] / precisions["fp32"], 1.0),
            "memory": min(middle["mixed"] / middle["copy"], 1.0),
            "links": 1.0,
        },
        "operation_seconds": middle["operation"],
        "host": {"link": middle["copy"], "memory_bandwidth": middle["copy"] * count, "memory": host},
    }


def described(values: dict[str, Any]) -> str:
    """The same as YAML."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k}: {text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, float):
            mantissa, _, exponent = f"{value:.3e}".partition("e")
            return f"{mantissa}e{int(exponent):+d}"
        return f'"{value}"' if isinstance(value, str) and not value.isidentifier() else str(value)

    head = "# Measured by `castalia plan --measure`; links between nodes are a guess, correct them.\n"
    return head + "".join(f"{key}: {text(value)}\n" for key, value in values.items())


def _cores() -> int:
    """Cores that this process may use, one of each pair of threads that share one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(usable, torch.get_num_threads()), 1)


def _memory(count: int, accelerator: bool) -> tuple[float, float]:
    """Bytes of a device, and of the host."""
    host = float(memory_bytes() or 8e9)
    if not accelerator:
        return host / count, host
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return float(device_memory(device) or host), host


def _measure_rank(world: World) -> dict[str, float]:
    """What one rank reaches while the others do the same."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device("cpu") if accelerator is None else torch.device(accelerator.type, world.rank)
    out = {"fp32": measure_matmul_flops(torch.float32, 2.0, device)}
    for name, dtype in (("bf16", torch.bfloat16), *((("fp16", torch.float16),) if accelerator else ())):
        out[name] = measure_matmul_flops(dtype, 1.0, device)
    big = torch.zeros(1 << 24, device=device)
    other = torch.empty_like(big)
    out["copy"] = 2 * big.numel() * 4 / _time(lambda: other.copy_(big), device)
    out["mixed"] = _mixed(device)
    out["attention"] = _attention(device)
    small = torch.zeros(8, device=device)
    out["operation"] = _time(lambda: [small.add_(1.0) for _ in range(100)], device) / 100
    out["link"], out["latency"] = out["copy"], 0.0
    if world.size > 1:
        out["link"], out["latency"] = _links(world)
    return out


def _mixed(device: torch.device) -> float:
    """Bytes per second of what layers do beside products: a norm, an activation, a sum, forward and backward."""
    x = torch.randn(512, 2048, device=device, requires_grad=True)

    def run() -> None:
        y = F.gelu(F.layer_norm(x, (2048,))) + x
        y.backward(torch.ones_like(y))

    from castalia.parallel.activation_memory import Watch

    with Watch([x]) as watch:
        run()
    return watch.work.moved / _time(run, device)


def _attention(device: torch.device) -> float:
    """FLOP/s of fused causal attention, half of the square counted."""
    q, k, v = (torch.randn(1, 4, 1024, 64, device=device) for _ in range(3))
    return 2 * q.numel() * 1024 / _time(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device)


def _links(world: World) -> tuple[float, float]:
    """Bytes per second of a ring that sums, and seconds of a sum of next to nothing per hop."""
    mesh, cpu = Mesh(Layout(replicate=world.size), world), torch.device("cpu")
    large, tiny = torch.zeros(_LARGE), torch.zeros(_TINY)
    slow = _time(lambda: mesh.sum_tensor(large, "replicate"), cpu)
    quick = _time(lambda: mesh.sum_tensor(tiny, "replicate"), cpu)
    hops = 2 * max((world.size - 1).bit_length(), 1)
    share = 2 * (world.size - 1) / world.size
    return share * large.numel() * 4 / max(slow - quick, 1e-9), quick / hops


def _time(run: Callable[[], Any], device: torch.device, times: int = 9) -> float:
    """Median seconds, after a first one that does not count."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])
