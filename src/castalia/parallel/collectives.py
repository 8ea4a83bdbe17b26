"""Collective operations that autograd can go back through, each with its mirror image.

    forward                        backward                        where
    copy            x              sum of gradients                into a column-cut matrix
    total           sum of x       gradient                        out of a row-cut matrix
    gather_partial  all of x       scattered sum of gradients      the same two, while the sequence
    scatter_sum     its share      all gradients                     is cut between matrices
    split           this share     all gradients                   into the sequence-cut region
    gather          all of x       this share of the gradient      where everybody computes the same after it

The pairs are f and g of Shoeybi et al. 2019 (Megatron-LM) and those of Korthikanti et al. 2022 for
sequence parallelism. A group of None is a group of one: the value itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def copy(x: Tensor, group: Group) -> Tensor:
    """`x`, whose gradient is the sum of everybody's."""
    return x if group is None else _Copy.apply(x, group)


def total(x: Tensor, group: Group) -> Tensor:
    """The sum of everybody's `x`; its gradient goes to each as it is."""
    return x if group is None else _Total.apply(x, group)


def gather_partial(x: Tensor, dim: int, group: Group) -> Tensor:
    """Everybody's `x` along `dim`; each uses it differently, so that gradients are summed on the way back."""
    return x if group is None else _GatherPartial.apply(x, dim, group)


def scatter_sum(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's share along `dim` of the sum of everybody's `x`."""
    return x if group is None else _ScatterSum.apply(x, dim, group)


def split(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's share along `dim` of what all ranks have alike."""
    return x if group is None else _Split.apply(x, dim, group)


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Everybody's `x` along `dim`, which all ranks then use alike."""
    return x if group is None else _Gather.apply(x, dim, group)


def _sum(x: Tensor, group: Any) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _all(x: Tensor, dim: int, group: Any) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    out = first.new_empty(dist.get_world_size(group) * first.shape[0], *first.shape[1:])
    dist.all_gather_single(out, first, group=group)
    return out.movedim(0, dim).contiguous()


def _mine_of_sum(x: Tensor, dim: int, group: Any) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    out = first.new_empty(first.shape[0] // dist.get_world_size(group), *first.shape[1:])
    dist.reduce_scatter_single(out, first, group=group)
    return out.movedim(0, dim).contiguous()


def _mine(x: Tensor, dim: int, group: Any) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _sum(grad, ctx.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _AlongDim(torch.autograd.Function):
    """What the four operations along a dimension share."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.dim, ctx.group = inputs


class _GatherPartial(_AlongDim):
    @staticmethod
    def forward(x: Tensor, dim: int, group: Any) -> Tensor:
        return _all(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _mine_of_sum(grad, ctx.dim, ctx.group), None, None


class _ScatterSum(_AlongDim):
    @staticmethod
    def forward(x: Tensor, dim: int, group: Any) -> Tensor:
        return _mine_of_sum(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all(grad, ctx.dim, ctx.group), None, None


class _Split(_AlongDim):
    @staticmethod
    def forward(x: Tensor, dim: int, group: Any) -> Tensor:
        return _mine(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all(grad, ctx.dim, ctx.group), None, None


class _Gather(_AlongDim):
    @staticmethod
    def forward(x: Tensor, dim: int, group: Any) -> Tensor:
        return _all(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _mine(grad, ctx.dim, ctx.group), None, None
