"""Parts of a matrix on several ranks -> the whole matrix, for optimizers that need to see it.

    rank 0: rows 0-3  ─┐
    rank 1: rows 4-7  ─┼─ each puts its rectangle into zeros, all are added ──> all rows, on every rank
    rank 2: rows 4-7  ─┘  (a copy: adds nothing)

A sum with zeros is exact, so every layout sees the same bits. What is not cut costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from castalia.optim.matrix import Whole
from castalia.parallel.layout import AXES
from castalia.parallel.mesh import Mesh
from castalia.parallel.plans import Place


class SpreadWhole:
    """See castalia.optim.matrix.Whole.

    Args:
        place: of this rank's part.
        first: this rank is the first of those that hold the same rectangle.
        mesh: the ranks; those of one pipeline stage hold parts of one parameter.
    """

    def __init__(self, place: Place, first: bool, mesh: Mesh) -> None:
        self.shape, self._first, self._mesh = place.shape, first, mesh
        self._region = tuple(slice(o, o + n) for o, n in zip(place.offset, place.local, strict=True))

    def gather(self, part: Tensor) -> Tensor:
        """See Whole."""
        whole = torch.zeros(self.shape, dtype=part.dtype, device=part.device)
        if self._first:
            whole[self._region] = part
        return self._mesh.sum_tensor(whole, *AXES[1:])

    def part(self, whole: Tensor) -> Tensor:
        """See Whole."""
        return whole[self._region]


def wholes(parameters: Mapping[str, Tensor], places: Mapping[str, Place], mesh: Mesh) -> dict[Tensor, Whole]:
    """How each parameter that is cut is reached; all ranks of a stage must call this."""
    mine = {n: (places[n].offset, places[n].local) for n in parameters}
    group, held = mesh.group(*AXES[1:]), [mine]
    rank = 0
    if group is not None:
        import torch.distributed as dist

        held, rank = [{} for _ in range(dist.get_world_size(group))], dist.get_rank(group)
        dist.all_gather_object(held, mine, group=group)
    cut = {n for n in parameters if any(theirs.get(n, (None, None))[1] != places[n].shape for theirs in held)}
    return {
        p: SpreadWhole(places[n], all(held[r].get(n) != mine[n] for r in range(rank)), mesh)
        for n, p in parameters.items()
        if n in cut
    }
