"""A store of weights among others: sums gradients over ranks, takes norms over all, tells what lies where.

    inner store (arena, plain, sharded) ──reduce──> gradients of the global batch
                                        ──norm────> over every rank's part, each part once
                                        ──tensors─> Pieces, by which checkpoints know the whole

The inner store holds plain local tensors whatever the layout, so clipping, update and refreshing are
its own business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint.tensors import Piece
from castalia.config import OptimizerConfig
from castalia.optim import WeightStore
from castalia.optim.matrix import MatrixOptimizer
from castalia.optim.one_bit import ERRORS, OneBitAdam, sketch
from castalia.optim.optimizers import optimizer_kind
from castalia.optim.weights import squares_of, sum_of_squares
from castalia.parallel.experts import holds_experts
from castalia.parallel.layout import AXES
from castalia.parallel.mesh import GRADIENT_AXES, Mesh
from castalia.parallel.peers import GroupPeers
from castalia.parallel.plans import Place
from castalia.parallel.whole import wholes

BUCKET = 1 << 25
"""Elements that are summed over ranks in one operation, at least, where gradients are separate tensors."""


class SpreadStore:
    """See WeightStore.

    Args:
        inner: of this rank's part.
        places: where each of its parameters lies.
        mesh: the ranks.
        shapes: of all parameters of the whole model; this rank may have a part of none of some.
        cfg: which optimizer, so which states there are.
    """

    def __init__(
        self,
        inner: WeightStore,
        places: dict[str, Place],
        mesh: Mesh,
        shapes: dict[str, tuple[int, ...]],
        cfg: OptimizerConfig,
    ) -> None:
        self.inner, self._places, self._mesh, self._shapes = inner, places, mesh, shapes
        self.optimizer = inner.optimizer
        self.prepare, self.working, self.collect = inner.prepare, inner.working, inner.collect
        self.discard, self.refresh, self.set_updates = inner.discard, inner.refresh, inner.set_updates
        self.step = inner.step
        self.gradients, self.averaged, self.trained = inner.gradients, inner.averaged, inner.trained
        self.reach, self.watch_first, self.sink = inner.reach, inner.watch_first, inner.sink
        if isinstance(inner.optimizer, MatrixOptimizer):
            inner.reach(wholes(inner.trained, places, mesh))
        self._kind, self._average = optimizer_kind(cfg), cfg.average is not None
        self._one_bit = inner.optimizer if isinstance(inner.optimizer, OneBitAdam) else None
        peers = mesh.group(*GRADIENT_AXES)
        if self._one_bit is not None and peers is not None:
            self._one_bit.connect(GroupPeers(peers))

    @torch.no_grad()
    def reduce(self) -> None:
        """See WeightStore."""
        gradients = self.inner.gradients()
        if self._mesh.layout.expert > 1:
            # Experts have seen the tokens of all ranks that share them.
            self._sum([g for n, g in gradients.items() if holds_experts(n)], "replicate", "context")
            self._sum([g for n, g in gradients.items() if not holds_experts(n)], *GRADIENT_AXES)
        elif self._one_bit is not None and self._one_bit.compresses:  # the update exchanges what comes of the others
            apart = self._one_bit.exchanged
            self._sum([p.grad for p in self.trained.values() if p not in apart and p.grad is not None], *GRADIENT_AXES)
        elif not self._mesh.layout.zero:
            self._sum(self.inner.gradient_buffers(), *GRADIENT_AXES)
        self._sum([g for n, g in gradients.items() if self._places[n].partial], "tensor")
        if self._mesh.layout.pipeline > 1 and "head.weight" not in self._shapes and "embedding.weight" in gradients:
            self._mesh.sum_over_ends(gradients["embedding.weight"])
        if self._mesh.layout.pipeline > 1 and "relative_bias.weight" in gradients:  # every stage uses the one table
            self._sum([gradients["relative_bias.weight"]], "pipeline")

    def so_far(self) -> dict[str, Tensor]:
        """See WeightStore."""
        return self.inner.so_far()

    @torch.no_grad()
    def squares_so_far(self) -> dict[str, float]:
        """See WeightStore. With ZeRO and no pipeline the gradients are of all data-parallel ranks together."""
        together = self._mesh.layout.zero > 0
        parts = {
            name: self._mesh.sum_tensor(part.clone(), "tensor") if self._places[name].partial else part
            for name, part in self.inner.so_far().items()
        }
        replicas = 1 if together else self._mesh.size(*GRADIENT_AXES)
        return self._added_up(parts, replicas, *((AXES,) if together else (("tensor",), ("pipeline",))))

    def squares(self) -> dict[str, float]:
        """See WeightStore; the same numbers on every rank."""
        return self._added_up(self.gradients(), 1, AXES)

    def _added_up(self, parts: dict[str, Tensor], replicas: int, *groups: tuple[str, ...]) -> dict[str, float]:
        """Squares by parameter of what the ranks of these groups hold together, each part once in each replica."""
        squares = {name: square / (self._places[name].copies / replicas) for name, square in squares_of(parts).items()}
        flat = [squares.get(name, 0.0) for name in self._shapes]
        for axes in groups:
            flat = self._mesh.sum(flat, *axes)
        return dict(zip(self._shapes, flat, strict=True))

    def gradient_buffers(self) -> list[Tensor]:
        """See WeightStore; of this rank's part."""
        return self.inner.gradient_buffers()

    def _sum(self, tensors: list[Tensor], *axes: str) -> None:
        """Sum tensors over ranks in place, small ones together."""
        if self._mesh.size(*axes) == 1:
            return
        bucket: list[Tensor] = []
        for tensor in [*tensors, None]:
            if tensor is not None and tensor.numel() < BUCKET:
                bucket.append(tensor)
            if bucket and (tensor is None or sum(t.numel() for t in bucket) >= BUCKET):
                flat = self._mesh.sum_tensor(torch.cat([t.reshape(-1) for t in bucket]), *axes)
                for part, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    part.copy_(total.view_as(part))
                bucket = []
            if tensor is not None and tensor.numel() >= BUCKET:
                self._mesh.sum_tensor(tensor, *axes)

    def gradient_norm(self) -> Tensor:
        """See WeightStore; the same number on every rank."""
        if self._one_bit is not None and self._one_bit.compresses:
            return self._estimated_norm(self._one_bit.exchanged)
        return self.norm_of(self.gradients())

    @torch.no_grad()
    def _estimated_norm(self, apart: set[Tensor]) -> Tensor:
        """The norm of the mean gradient, though each rank has but its share of those of some parameters."""
        shares = [p.grad for p in self.trained.values() if p in apart and p.grad is not None]
        square = self._mesh.sum_tensor(sketch(shares), *GRADIENT_AXES).square().sum()
        for parameter in self.trained.values():
            if parameter not in apart and parameter.grad is not None:
                square += sum_of_squares(parameter.grad)
        return square.sqrt().float()

    @torch.no_grad()
    def norm_of(self, parts: dict[str, Tensor]) -> Tensor:
        """L2 norm of what all ranks hold together, by parameter name: fp32 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        for name, part in parts.items():
            total += sum_of_squares(part) / self._places[name].copies
        return self._mesh.sum_tensor(total, *AXES).sqrt().float()

    def totals(self, amounts: dict[str, list[float]]) -> dict[str, list[float]]:
        """Amounts of all ranks' parts together, each part once, in one collective operation.

        Args:
            amounts: of this rank's parts of everything that `tensors` names, as many of each; zeros where it has none.
        """
        names, flat = sorted(amounts), list[float]()
        for key in names:
            name, whole = self._named(key)
            own = key.endswith(ERRORS)  # each rank has others
            each = self._places[name].copies if name in self._places and not whole and not own else 1
            flat += [float(any(amounts[key])), *(amount / each for amount in amounts[key])]
        flat = self._mesh.sum(flat, *AXES)
        width, out = len(flat) // len(names), {}
        for i, key in enumerate(names):
            holders, *sums = flat[i * width : (i + 1) * width]
            copies = max(holders, 1.0) if self._named(key)[1] else 1.0  # alike wherever there is one
            out[key] = [total / copies for total in sums]
        return out

    def _named(self, key: str) -> tuple[str, bool]:
        """The parameter that one of `tensors` belongs to, and whether each rank that has it has all of it."""
        kind, _, rest = key.partition(".")
        name, _, state = (rest, "", "") if kind == "model" else rest.rpartition(".")
        return name, state in self._whole_states(name, self._shapes[name])

    def tensors(self) -> dict[str, Any]:
        """See WeightStore; Pieces where a rank holds a part."""
        out: dict[str, Any] = {}
        for key, tensor in self.inner.tensors().items():
            # By name, not by shape: a square state of a whole matrix may be shaped as a rank's part of the matrix.
            name, whole = self._named(key)
            place = self._places[name]
            if whole:
                out[key] = Piece(tensor, tensor.shape, (0,) * tensor.ndim)
            elif key.endswith(ERRORS):  # stacked by rank
                rows, ranks = len(tensor), self._mesh.size(*GRADIENT_AXES)
                first = (rows * self._mesh.data_rank, *(0 for _ in tensor.shape[1:]))
                out[key] = Piece(tensor, (rows * ranks, *tensor.shape[1:]), first)
            else:
                out[key] = Piece(tensor, place.shape, place.offset)
        for name, shape in self._shapes.items():
            if name not in self._places:
                for key, size in self._elsewhere(name, shape):
                    out[key] = Piece(torch.empty(0, *size[1:]), size, (0,) * len(size))
        return out

    def _elsewhere(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and whole shapes of what a checkpoint holds of a parameter of which this rank has no part."""
        is_matrix = self._is_matrix(name, shape)
        yield f"model.{name}", shape
        for moment in (*self._kind.moments_of(is_matrix), *(("average",) if self._average else ())):
            yield f"optimizer.{name}.{moment}", shape
        for state, size in self._whole_states(name, shape).items():
            yield f"optimizer.{name}.{state}", size

    def _is_matrix(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._kind.matrices(name, torch.empty(shape, device="meta"))

    def _whole_states(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """States that belong to a whole parameter of this shape, whatever part of it a rank holds."""
        return self._kind.whole(shape, self._is_matrix(name, shape))
