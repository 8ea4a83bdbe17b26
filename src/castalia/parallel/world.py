"""Which process this is, on which device: the only reader of launcher variables, the only place that names a device.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT ──> World(rank, size, device) + the default group

Slurm's and the MPIs' variables are translated to these first (schedulers.py).

A single process needs none of them and never starts torch.distributed. The collective
backend follows from the device (nccl, hccl, xccl, ...; gloo for the CPU).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from castalia.errors import UserError
from castalia.parallel.schedulers import scheduler_variables

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank, size: of the process and of the job.
        device: what this process computes on.
        local_rank: of the process on its machine.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0


def enter_world(device: str | None = None) -> World:
    """Find out where we are; `joined` then connects the processes.

    Args:
        device: performance.device; None takes the accelerator if there is one, else the CPU. With several
            processes on a machine, each takes the accelerator of its local rank.

    Raises:
        UserError: the device does not exist here, or the launcher's variables are not complete.
    """
    os.environ.update(scheduler_variables(os.environ))  # as torch.distributed wants to read them
    size, rank, local = (
        _number(name, default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {size}: start through torchrun or `castalia train --procs`")
    if size > 1:
        missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {size}, but {missing[0]} is not set: start through torchrun or `castalia train --procs`"
            )
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        chosen = accelerator or torch.device("cpu")
        if size > 1 and chosen.type != "cpu":
            chosen = torch.device(chosen.type, local)
            torch.accelerator.set_device_index(local)
        return World(rank, size, chosen, local)
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        why = "" if first.startswith("Expected one of") else f" ({first})"  # torch's list of all devices there are
        raise UserError(
            f"performance.device: '{device}' cannot be used on this machine{why}: leave it out to take what there is"
        ) from None
    return World(rank, size, chosen, local)


def processes_here(world: World) -> int:
    """Processes of the job on this host, by the launcher's word; without it, all of them."""
    return _number("LOCAL_WORLD_SIZE", world.size)


def device_memory(device: torch.device) -> int | None:
    """Bytes of an accelerator's memory; None where torch cannot tell, or the device is a CPU."""
    if device.type == "cpu":
        return None
    try:
        return int(torch.accelerator.get_memory_info(device)[1])
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


def launched() -> bool:
    """Whether a launcher has started this process as one of a job."""
    return bool(os.environ.get("WORLD_SIZE") or scheduler_variables(os.environ))


def local_devices(device: str | None = None) -> int:
    """Processes that make use of this machine: one for each accelerator; 1 on a CPU, or where a device is named."""
    if device is not None or not torch.accelerator.is_available():
        return 1
    return max(torch.accelerator.device_count(), 1)


@contextmanager
def joined(world: World, timeout: timedelta = TIMEOUT, init_method: str = "env://") -> Iterator[None]:
    """Connect the processes of the job for the time of the block; nothing for a single process.

    Args:
        timeout: of a collective operation.
        init_method: where the processes meet, as torch.distributed wants it.
    """
    if world.size == 1:
        yield
        return
    import torch.distributed as dist

    if dist.is_initialized():  # by whoever called us: theirs to end
        yield
        return
    try:
        backend = dist.get_default_backend_for_device(world.device)
    except ValueError:
        raise UserError(
            f"torch has no collective operations for '{world.device.type}': install the package of the device's maker "
            "that registers them, or train on one process"
        ) from None
    dist.init_process_group(backend, init_method=init_method, rank=world.rank, world_size=world.size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}, which is no number: mend the launcher's environment") from None


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: allocated on an accelerator that counts them, else resident memory."""
    if device.type != "cpu":
        try:
            return torch.accelerator.max_memory_allocated()
        except RuntimeError:  # its allocator keeps no statistics
            pass
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
