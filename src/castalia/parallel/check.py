"""Do the collective operations of this job give what they should? For `castalia doctor`.

Each rank contributes numbers that say which rank they are from, so that a result that is
missing a rank, or has one twice or in the wrong place, is wrong by a whole number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from castalia.parallel.world import World

_DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def collective_faults(world: World) -> dict[str, list[str]]:
    """Try each operation that training uses, in each dtype; in every process of a joined job.

    Returns:
        For each operation what is wrong, one entry for each dtype; an empty list where all is right.
    """
    n, r, device = world.size, world.rank, world.device

    def numbers(rank: int, dtype: torch.dtype, count: int = 4) -> Tensor:
        return (torch.arange(count, device=device) + 10 * rank).to(dtype)

    def all_reduce(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = numbers(r, dtype)
        dist.all_reduce(x)
        return x, sum((numbers(i, dtype) for i in range(1, n)), numbers(0, dtype))

    def all_gather(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out = torch.empty(4 * n, dtype=dtype, device=device)
        dist.all_gather_single(out, numbers(r, dtype))
        return out, torch.cat([numbers(i, dtype) for i in range(n)])

    def reduce_scatter(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out = torch.empty(4, dtype=dtype, device=device)
        dist.reduce_scatter_single(out, numbers(r, dtype, 4 * n))
        whole = sum((numbers(i, dtype, 4 * n) for i in range(1, n)), numbers(0, dtype, 4 * n))
        return out, whole[4 * r : 4 * r + 4]

    def all_to_all(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out = torch.empty(4 * n, dtype=dtype, device=device)
        dist.all_to_all_single(out, numbers(r, dtype, 4 * n))
        return out, torch.cat([numbers(i, dtype, 4 * n)[4 * r : 4 * r + 4] for i in range(n)])

    def broadcast(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = numbers(r, dtype)
        dist.broadcast(x, n - 1)
        return x, numbers(n - 1, dtype)

    def send_and_receive(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = torch.empty(4, dtype=dtype, device=device)
        ring = [
            dist.P2POp(dist.isend, numbers(r, dtype), (r + 1) % n),
            dist.P2POp(dist.irecv, x, (r - 1) % n),
        ]
        for request in dist.batch_isend_irecv(ring):
            request.wait()
        return x, numbers((r - 1) % n, dtype)

    operations: tuple[Callable[[torch.dtype], tuple[Tensor, Tensor]], ...] = (
        all_reduce,
        all_gather,
        reduce_scatter,
        all_to_all,
        broadcast,
        send_and_receive,
    )
    return {
        operation.__name__: [fault for dtype in _DTYPES if (fault := _fault(operation, dtype)) is not None]
        for operation in operations
    }


def _fault(operation: Callable[[torch.dtype], tuple[Tensor, Tensor]], dtype: torch.dtype) -> str | None:
    try:
        got, wanted = operation(dtype)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"{dtype}: {str(error).splitlines()[0]}"
    return None if torch.equal(got, wanted) else f"{dtype}: gave {got.tolist()} instead of {wanted.tolist()}"


def gather_bytes(data: bytes, world: World) -> list[bytes]:
    """What each process gives, by rank, in every process of a joined job."""
    gathered: list[bytes] = [b""] * world.size
    dist.all_gather_object(gathered, data)
    return gathered
