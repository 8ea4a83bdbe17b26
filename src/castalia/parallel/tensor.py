"""A model on the meta device -> this rank's share of its matrices, and the exchanges between them.

    x ─copy─> [ qkv ─ heads ─ out ]─sum─> + bias ─> residual          each rank: some heads,
    x ─copy─> [ up, gate ─ act ─ down ]─sum─> + bias ─> residual                some inner columns

With sequence parallelism `copy` becomes an all-gather and `sum` a reduce-scatter over the sequence,
and what lies between (norms, dropout, residual) works on a share of the tokens. Parameters are
replaced by smaller ones of the same names; modules that must speak are replaced by ones that do, or
have their inputs exchanged by hooks. No forward is rewritten.
(Shoeybi et al. 2019; Korthikanti et al. 2022)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.model.attention import Core
from castalia.model.attention_mask import Drop, MaskSpec
from castalia.model.collected import Routing
from castalia.model.layers import native_product
from castalia.model.moe import MoE
from castalia.model.norms import wide
from castalia.model.transformer import Transformer
from castalia.parallel import collectives
from castalia.parallel.collectives import Group
from castalia.parallel.plans import Place

SEQUENCE = 1  # dimension of the sequence in [B, S, h]


class RowLinear(nn.Module):
    """y = sum over ranks of x W^T, + b: columns of W are spread, the sum is made in fp32.

    Args:
        linear: whose parameters it takes over.
        group: the ranks that share W.
        sequence: each gets its share of the tokens of y, instead of all of them.
    """

    def __init__(self, linear: nn.Linear, group: Group, sequence: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.product = getattr(linear, "product", native_product)
        self._group, self._sequence = group, sequence

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, in / ranks]` to fp32 `[B, S or S / ranks, out]`."""
        y = wide(self.product(x, self.weight, None))
        y = collectives.scatter_sum(y, SEQUENCE, self._group) if self._sequence else collectives.total(y, self._group)
        return y if self.bias is None else y + wide(self.bias.to(self.weight.dtype))


class VocabularyEmbedding(nn.Embedding):
    """A table whose rows are spread: each rank looks up what it holds, the others add nothing.

    Args:
        weight: the rows held here.
        first: number of the first one.
        group: the ranks that share the table.
    """

    def __init__(self, weight: nn.Parameter, first: int, group: Group) -> None:
        super().__init__(weight.shape[0], weight.shape[1], _weight=weight)
        self.first, self._group = first, group

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 `[B, S]` to fp32 `[B, S, h]`."""
        row = tokens - self.first
        here = (row >= 0) & (row < self.weight.shape[0])
        found = F.embedding(row.clamp(0, self.weight.shape[0] - 1), self.weight)
        return collectives.total(wide(found) * here.unsqueeze(-1), self._group)


class SomeHeads:
    """An attention core for the heads that a rank holds: masks, biases and dropout are those of their numbers.

    Args:
        core: that computes.
        first, count: the query heads held here.
    """

    def __init__(self, core: Core, first: int, count: int) -> None:
        self._core, self._first, self._count = core, first, count

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, drop: Drop | None = None, scale: float | None = None
    ) -> Tensor:
        """See castalia.model.attention.Core."""
        if "heads" not in mask.memo:  # once for all layers that share the mask
            mask.memo["heads"] = mask.heads(self._first, self._count)
        if drop is not None:
            drop = replace(drop, first_head=self._first)
        return self._core(q, k, v, cast(MaskSpec, mask.memo["heads"]), drop, scale)


class Vocabulary:
    """The loss's view of a spread vocabulary (castalia.model.loss.VocabularyShard)."""

    def __init__(self, first: int, group: Group) -> None:
        self.first, self._group = first, group

    def largest(self, x: Tensor) -> Tensor:
        """See VocabularyShard."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self._group)
        return x

    def total(self, x: Tensor) -> Tensor:
        """See VocabularyShard."""
        dist.all_reduce(x, group=self._group)
        return x


def spread(model: Transformer, places: Mapping[str, Place], group: Group, rank: int, sequence: bool) -> None:
    """Cut a model that is on the meta device, in place.

    Args:
        places: the rectangle of each parameter.
        group, rank: the tensor-parallel ranks, and which this is.
        sequence: sequence parallelism.
    """
    ranks = dist.get_world_size(group)
    modules = dict(model.named_modules())
    for name, place in places.items():
        if name in dict(model.named_parameters()) and place.local != place.shape:
            owner, _, leaf = name.rpartition(".")
            old = modules[owner]._parameters[leaf]
            assert old is not None
            new = torch.empty(place.local, dtype=old.dtype, device=old.device)
            modules[owner].register_parameter(leaf, nn.Parameter(new, requires_grad=old.requires_grad))
    if model.embedding is not None:
        first = places["embedding.weight"].offset[0]
        model.embedding = VocabularyEmbedding(cast(nn.Parameter, model.embedding.weight), first, group)
    for block in model.layers:
        _spread_block(block, group, ranks, rank, sequence)
    if sequence:
        model.final_norm.register_forward_hook(lambda _, __, y: collectives.gather_partial(y, SEQUENCE, group))
    else:
        # A copy in memory too: FSDP2 warns of outputs that are views.
        model.final_norm.register_forward_hook(lambda _, __, y: collectives.copy(y, group).clone())


def _spread_block(block: Any, group: Group, ranks: int, rank: int, sequence: bool) -> None:
    """One transformer block: its attention keeps some heads, its MLP some inner columns."""

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        x = collectives.gather_partial(x, SEQUENCE, group) if sequence else collectives.copy(x, group)
        return (x, *inputs[1:])

    def share_tokens(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, layer, context = inputs
        x = collectives.split(x, SEQUENCE, group) if layer == 0 else x
        if context.dropout is not None:
            context = context._replace(dropout=context.dropout.share(rank, x.shape[SEQUENCE]))
        return x, layer, context

    def leave(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        return collectives.scatter_sum(y, SEQUENCE, group) if sequence else collectives.total(y, group)

    def shared_losses(_: nn.Module, __: Any, out: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
        """Every rank adds the same losses of the routing, whose gradients are then summed: each gives its share."""
        weights, routing = out
        logits, scores = (_PartOfGradient.apply(t, ranks) for t in (routing.logits, routing.scores))
        return weights, Routing(cast(Tensor, logits), cast(Tensor, scores), routing.chosen)

    def all_tokens(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, layer, context = inputs
        if context.dropout is not None:
            context = context._replace(dropout=context.dropout.whole)
        return x, layer, context

    attention, mlp = block.attention, block.mlp
    attention.n, attention.k = attention.n // ranks, attention.k // ranks
    attention.core = SomeHeads(attention.core, rank * attention.n, attention.n)
    attention.out = RowLinear(attention.out, group, sequence)
    if isinstance(mlp, MoE):
        # Ranks hold some inner columns of every expert: what they make are parts of sums.
        mlp.router.register_forward_hook(shared_losses)
        mlp.register_forward_hook(leave)
        mlp.register_forward_pre_hook(all_tokens)
    else:
        mlp.down = RowLinear(mlp.down, group, sequence)
    for part in (attention, mlp):
        part.register_forward_pre_hook(enter)
    if sequence:
        block.register_forward_pre_hook(share_tokens)


class _PartOfGradient(torch.autograd.Function):
    """The value itself; one of so many shares of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: int) -> Tensor:
        ctx.shares = shares
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / ctx.shares, None
