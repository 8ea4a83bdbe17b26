"""Which process this is, on which device: the only reader of launcher variables, the only place that names a device.

For now a run is one process. `World` is what the rest is given, so that it stays true when
there are more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from castalia.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank, size: of the process and of the job.
        device: what this process computes on.
    """

    rank: int
    size: int
    device: torch.device


def enter_world(device: str | None = None) -> World:
    """Find out where we are.

    Args:
        device: performance.device; None takes the accelerator if there is one, else the CPU.

    Raises:
        UserError: the device does not exist here, or a launcher started several processes.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if size != "1":
        raise UserError(f"WORLD_SIZE is {size}, but this release trains in one process: start it without a launcher")
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return World(0, 1, accelerator or torch.device("cpu"))
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"performance.device: '{device}' cannot be used on this machine: {first}") from None
    return World(0, 1, chosen)


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: resident memory on a CPU, allocated memory on an accelerator."""
    if device.type == "cpu":
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return torch.accelerator.max_memory_allocated()
