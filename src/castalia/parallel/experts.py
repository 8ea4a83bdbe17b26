"""Experts over several ranks: rows travel to the rank that holds their expert, and back.

    x [T,h] ─rows by expert─> [T k, h] ─all to all─> rows of this rank's experts ─sort─> experts
    y [T,h] <─weighted sums─  [T k, h] <─all to all─ <──────────────────────────unsort─┘

The ranks are data-parallel ones: each has its own tokens, and every parameter but the experts' as without.
Tensor ranks hold some inner columns of each expert, and each sends all rows to those of its own number. A
rank's experts see the tokens of all ranks of its group, so that their gradients are complete within it.
(Lepikhin et al. 2021)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from castalia.model.moe import Experts, MoE, Router
from castalia.model.norms import wide
from castalia.parallel.collectives import Group
from castalia.parallel.mesh import Mesh
from castalia.parallel.plans import Place, bounds

_EXPERTS = re.compile(r"\.mlp\.experts\.(up|gate|down)\.weight$")


def holds_experts(name: str) -> bool:
    """Whether a parameter is of stacked experts."""
    return _EXPERTS.search(name) is not None


def spread_experts(model: nn.Module, places: Mapping[str, Place], mesh: Mesh) -> dict[str, Place]:
    """Leave a model on the meta device only this rank's experts, in place; where its parameters then lie."""
    ranks, rank, out = mesh.layout.expert, mesh.index("shard"), dict(places)
    for name, parameter in list(model.named_parameters()):
        if holds_experts(name):
            first, end = bounds(places[name].shape[0], ranks, rank)
            local = (end - first, *places[name].local[1:])
            offset = (first, *places[name].offset[1:])
            out[name] = replace(places[name], offset=offset, local=local, copies=places[name].copies // ranks)
            owner, _, leaf = name.rpartition(".")
            small = nn.Parameter(torch.empty(local, device=parameter.device), requires_grad=parameter.requires_grad)
            model.get_submodule(owner).register_parameter(leaf, small)
    for module in model.modules():
        if isinstance(module, MoE):
            count = module.router.weight.shape[0]
            module.dispatcher = FarDispatcher(count, mesh.group("shard"))
    return out


def rebalance(router: Router, counts: Tensor) -> None:
    """As `Router.rebalance`, of the biases that ZeRO leaves on this rank."""
    bias: Any = router.bias
    if not hasattr(bias, "to_local"):
        router.rebalance(counts)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(bias.shape, bias.device_mesh, bias.placements)
    router.rebalance(counts, bias.to_local(), offset[0] if shape[0] else 0)


class FarDispatcher:
    """See castalia.model.moe.Dispatcher.

    Args:
        count: experts of the layer, over all ranks.
        group: the ranks that share them.
    """

    def __init__(self, count: int, group: Group) -> None:
        self._count, self._group = count, group
        ranks = dist.get_world_size(group)
        self._held = [end - first for first, end in (bounds(count, ranks, rank) for rank in range(ranks))]
        self._mine = self._held[dist.get_rank(group)]

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        """See Dispatcher."""
        tokens, k = chosen.shape
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        # How many rows of each of my experts every rank sends, and how many of each expert I send.
        mine = torch.bincount(flat, minlength=self._count)
        theirs = mine.new_empty(len(self._held) * self._mine)
        dist.all_to_all_single(theirs, mine, [self._mine] * len(self._held), self._held, group=self._group)
        by_source = theirs.view(len(self._held), self._mine)
        sent = [int(part.sum()) for part in mine.split(self._held)]
        came = by_source.sum(1).tolist()
        rows = _Exchange.apply(x[order // k], came, sent, self._group)
        # They came by source and expert; the experts want them by expert.
        expert = torch.arange(self._mine, device=x.device).repeat(len(self._held)).repeat_interleave(theirs)
        sort = expert.argsort(stable=True)
        back = torch.empty_like(sort)
        back[sort] = torch.arange(len(sort), device=x.device)
        out = experts(rows[sort], by_source.sum(0))[back]
        home = _Exchange.apply(out, sent, came, self._group)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=x.device)
        return (wide(home[place]).view(tokens, k, -1) * weights.unsqueeze(-1)).sum(1)


class _Exchange(torch.autograd.Function):
    """Rows to and from all ranks; the gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, came: list[int], sent: list[int], group: Any) -> Tensor:
        ctx.came, ctx.sent, ctx.group = came, sent, group
        return _exchanged(rows, came, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _exchanged(grad, ctx.sent, ctx.came, ctx.group), None, None, None


def _exchanged(rows: Tensor, came: list[int], sent: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(came), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), came, sent, group=group)
    return out
