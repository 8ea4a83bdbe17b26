"""Bytes between data-parallel ranks: how 1-bit Adam reaches the others (castalia.optim.one_bit.Peers).

Gradients are never seen here: what is exchanged has been compressed already.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class GroupPeers:
    """See castalia.optim.one_bit.Peers.

    Args:
        group: the ranks; this one is among them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks, self.rank, self._group = dist.get_world_size(group), dist.get_rank(group), group

    def swap(self, parts: Tensor) -> Tensor:
        """See Peers."""
        arrived = torch.empty_like(parts)
        dist.all_to_all_single(arrived, parts.contiguous(), group=self._group)
        return arrived

    def gather(self, part: Tensor) -> Tensor:
        """See Peers."""
        everywhere = part.new_empty(self.ranks * part.numel())
        dist.all_gather_single(everywhere, part.contiguous(), group=self._group)
        return everywhere.view(self.ranks, -1)
