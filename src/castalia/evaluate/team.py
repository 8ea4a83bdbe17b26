"""Processes that share requests: each holds the whole model, scores every n-th, and learns the others' results.

requests ──[rank :: size]──> own results ──sum over ranks of a table with zeros elsewhere──> all results
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from castalia.parallel.layout import AXES, Layout
from castalia.parallel.mesh import Mesh
from castalia.parallel.world import World


class Ranks:
    """All processes of a job, as `castalia.evaluate.subject.Team` wants them.

    Args:
        mesh: in which every process has the whole model.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.size = mesh.world.rank, mesh.world.size
        self._mesh = mesh

    @classmethod
    def of(cls, world: World) -> Ranks:
        """The processes of a job that have nothing else to do."""
        return cls(Mesh(Layout(replicate=world.size), world))

    def total(self, values: Tensor) -> Tensor:
        """The elementwise sum over all processes, on the CPU."""
        moved = values.to(self._mesh.device)
        return self._mesh.sum_tensor(moved, *AXES).cpu()

    def texts(self, own: Mapping[int, str], count: int) -> list[str]:
        """Texts 0 .. count-1, of which each process has some."""
        encoded = {number: text.encode() for number, text in own.items()}
        sizes = torch.zeros(count, dtype=torch.int64)
        for number, text in encoded.items():
            sizes[number] = len(text)
        ends = self.total(sizes).cumsum(0).tolist()
        begins = [0, *ends[:-1]]
        flat = torch.zeros(ends[-1] if ends else 0, dtype=torch.int64)
        for number, text in encoded.items():
            flat[begins[number] : ends[number]] = torch.tensor(list(text), dtype=torch.int64)
        whole = bytes(self.total(flat).tolist())
        return [whole[begin:end].decode() for begin, end in zip(begins, ends, strict=True)]
