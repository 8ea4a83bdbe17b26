"""Which ranks speak to each other: a layout and a world -> groups of processes by axis.

    Mesh.group("tensor")                  the ranks that share this one's matrices
    Mesh.group(*GRADIENT_AXES)            the ranks whose gradients are summed

A group of one is None, and everything that takes a group does nothing then; so the code that
uses a mesh is the same on one process, where torch.distributed is never started.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from castalia.errors import UserError
from castalia.parallel.layout import AXES, Layout
from castalia.parallel.world import World

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
GRADIENT_AXES = ("replicate", "shard", "context")
"""Ranks along these see different tokens with the same weights."""


class Mesh:
    """The processes of a job, arranged.

    Args:
        layout: sizes of the axes; their product is the world's size.
        world: this process.
    """

    def __init__(self, layout: Layout, world: World) -> None:
        if layout.world != world.size:
            raise ValueError(f"a layout for {layout.world} processes in a world of {world.size}")
        self.layout, self.world, self.device = layout, world, world.device
        self._where = layout.coordinate(world.rank)
        self._groups: dict[tuple[str, ...], ProcessGroup | None] = {}
        self._all: DeviceMesh | None = None
        if world.size > 1:
            from torch.distributed.device_mesh import init_device_mesh

            self._all = init_device_mesh(world.device.type, layout.sizes, mesh_dim_names=AXES)
            # Every rank must make every group, in one order.
            for axes in (
                *((axis,) for axis in AXES),
                GRADIENT_AXES,
                AXES,
                ("shard", "context"),
                ("replicate", "shard"),
                AXES[:-1],
                AXES[1:],
                ("replicate", "context"),
            ):
                self._groups[axes] = self._make(axes)

        self._ends = self._make_ends() if layout.pipeline > 1 else None

    def _make_ends(self) -> ProcessGroup | None:
        """This rank's group of the first and the last stage's ranks; None on other stages."""
        import torch.distributed as dist

        stride, mine = self.world.size // self.layout.pipeline, None
        for first in range(stride):
            ranks = [first, first + (self.layout.pipeline - 1) * stride]
            group = dist.new_group(ranks)
            if self.world.rank in ranks:
                mine = group
        return mine

    def sum_over_ends(self, value: Tensor) -> None:
        """Sum a tensor that the first and the last stage of the pipeline both hold, in place."""
        assert self._ends is not None, "only the ends of a pipeline share something"
        self._reduce(value, self._ends)

    def _reduce(self, value: Tensor, group: ProcessGroup) -> None:
        """Sum in place, by way of the device where the host holds the tensor."""
        import torch.distributed as dist

        there = value.to(self.device)
        dist.all_reduce(there, group=group)
        if there is not value:
            value.copy_(there)

    def _make(self, axes: tuple[str, ...]) -> ProcessGroup | None:
        if self.size(*axes) == 1:
            return None
        return self.device_mesh(*axes).get_group()

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """torch's one-dimensional mesh along one axis, or along several taken together."""
        assert self._all is not None, "one process has no mesh"
        part = self._all[axes]
        return part if len(axes) == 1 else part._flatten("_".join(axes))

    def replicas_of_shards(self) -> DeviceMesh:
        """The two-dimensional mesh of HSDP: replicas of groups over which state is spread."""
        assert self._all is not None, "one process has no mesh"
        if self.layout.context == 1:
            return self._all["replicate", "shard"]
        self._all["shard", "context"]._flatten("shard_context")
        return self._all["replicate", "shard_context"]

    def group(self, *axes: str) -> ProcessGroup | None:
        """The ranks that differ from this one along these axes alone; None where there is no other."""
        return self._groups[axes] if self._all is not None else None

    def size(self, *axes: str) -> int:
        """How many ranks that are."""
        out = 1
        for axis in axes:
            out *= getattr(self.layout, axis)
        return out

    def index(self, axis: str) -> int:
        """This rank's place along an axis."""
        return self._where[axis]

    @property
    def data_rank(self) -> int:
        """Which of the `layout.data` replicas this rank belongs to: it decides which samples it reads."""
        return self.index("replicate") * self.layout.shard + self.index("shard")

    def sum(self, values: Sequence[float], *axes: str) -> list[float]:
        """Each number, summed in fp64 over the ranks along the axes."""
        group = self.group(*axes)
        if group is None:
            return list(values)
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64, device=self.device), *axes).tolist()

    def agreed(self, signals: list[int]) -> list[int]:
        """The signals that this rank has caught; if it has none, one that another has caught."""
        if self.world.size == 1:
            return signals
        import torch.distributed as dist

        most = torch.tensor(max(signals, default=0), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return signals or [int(most)] * bool(most)

    def from_first(self, value: T) -> T:
        """What the first rank has, on every rank; pickled."""
        if self.world.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum_tensor(self, value: Tensor, *axes: str) -> Tensor:
        """A tensor, summed in place over the ranks along the axes; returned."""
        group = self.group(*axes)
        if group is not None:
            self._reduce(value, group)
        return value

    def largest(self, value: Tensor) -> Tensor:
        """A tensor's elementwise maximum over all ranks, in place; returned."""
        if self.world.size > 1:
            import torch.distributed as dist

            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def host_group(self) -> ProcessGroup | None:
        """A new group of all ranks that speaks on the hosts, for a thread of its own; every rank must ask for it."""
        if self.world.size == 1:
            return None
        import torch.distributed as dist

        return dist.new_group(backend="gloo")


def agree(world: World, layout: str) -> None:
    """Refuse to go on where the first process has another layout: groups made by two of them would never meet.

    Raises:
        UserError: it has.
    """
    if world.size == 1:
        return
    import torch.distributed as dist

    box = [layout]
    dist.broadcast_object_list(box, src=0)
    if box[0] != layout:
        raise UserError(
            f"rank {world.rank} has another parallel: section than rank 0 ({layout} here, {box[0]} there): give all "
            "the same files, and sizes instead of parallel.layout auto where hosts differ in memory"
        )


def local_mesh(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of a single process."""
    return Mesh(Layout(), World(0, 1, torch.device(device)))
