"""One sequence over several ranks: each holds some of its tokens, and attention fetches the keys before them.

    rank c of C:  chunks c and 2C-1-c of 2C ─> q, k, v of these        0 1 2 3 | 4 5 6 7    chunks, C = 4
                  k, v ─gather over the ranks─> of all tokens          a b c d   d c b a    ranks
                  each chunk's q, keys up to its end ─core(past)─> y

A causal query sees the keys before it: with a chunk from the front and its mirror image from the end, every rank
has the same work. Everything else in a layer works on each token alone. Positions, masks, documents and dropout
are by a token's number in the whole sequence, so that the result is that of one rank. Gradients of keys and
values are summed on the way back (a reduce-scatter).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from castalia.data.loader import Batch
from castalia.model.attention import Core
from castalia.model.attention_mask import Drop, MaskSpec
from castalia.model.transformer import Transformer
from castalia.parallel.collectives import Group, gather_partial
from castalia.parallel.layout import held_tokens
from castalia.parallel.mesh import Mesh

TOKENS = 2  # dimension of the sequence in [B, heads, S, d]


class WholeKeys:
    """An attention core for queries of some tokens of a sequence whose other tokens are elsewhere.

    Args:
        core: that computes.
        group, rank, ranks: those that share the sequence, and which this is.
        balanced: how they share it (castalia.parallel.layout.held_tokens).
    """

    def __init__(self, core: Core, group: Group, rank: int, ranks: int, balanced: bool) -> None:
        self._core, self._group, self._rank, self._ranks, self._balanced = core, group, rank, ranks, balanced

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, drop: Drop | None = None, scale: float | None = None
    ) -> Tensor:
        """See castalia.model.attention.Core; q, k and v are of this rank's tokens."""
        length = q.shape[TOKENS] * self._ranks
        chunks = [held_tokens(length, self._ranks, rank, self._balanced) for rank in range(self._ranks)]
        gathered = gather_partial(torch.stack([k, v]), TOKENS + 1, self._group)
        pieces = gathered.split(len(chunks[0][0]), TOKENS + 1)
        starts = [chunk.start for held in chunks for chunk in held]
        both = gathered
        if starts != sorted(starts):
            both = torch.cat([piece for _, piece in sorted(zip(starts, pieces, strict=True), key=lambda p: p[0])], 3)
        if drop is not None:
            drop = replace(drop, length=length)
        mine, out = chunks[self._rank], []
        if "chunks" not in mask.memo:  # once for all layers that share the mask
            mask.memo["chunks"] = [_mask_of(mask, number, chunk) for number, chunk in enumerate(mine)]
        for part, chunk, queries in zip(mask.memo["chunks"], mine, q.split(len(mine[0]), TOKENS), strict=True):
            k, v = both[:, :, :, : chunk.stop].unbind()
            out.append(self._core(queries, k, v, part, drop, scale))
        return out[0] if len(out) == 1 else torch.cat(out, TOKENS)


def _mask_of(mask: MaskSpec, number: int, chunk: range) -> MaskSpec:
    """What the queries of a chunk, the `number`-th of those that are held, see of all keys up to its end."""
    bias = mask.bias
    if bias is not None:
        keys = torch.arange(chunk.stop, device=bias.queries.device).unsqueeze(0)
        if mask.documents is not None:
            keys = keys - mask.documents.starts[:, : chunk.stop]
        here = slice(number * len(chunk), (number + 1) * len(chunk))
        bias = replace(bias, queries=bias.queries[:, here], keys=keys)
    return replace(mask, past=chunk.start, bias=bias, dense=None, memo={})


def spread_sequence(model: Transformer, mesh: Mesh) -> None:
    """Give a model on the meta device attention that reaches the keys of other ranks, in place."""
    model.masks.matrices = False
    where = mesh.group("context"), mesh.index("context"), mesh.layout.context, mesh.layout.balanced
    for block in cast(Any, model.layers):
        block.attention.core = WholeKeys(block.attention.core, *where)


def rows_held(length: int, mesh: Mesh) -> Tensor | None:
    """Numbers of this rank's tokens in sequences of `length`, int64 on its device; None where it holds all."""
    layout = mesh.layout
    if layout.context == 1:
        return None
    chunks = held_tokens(length, layout.context, mesh.index("context"), layout.balanced)
    return torch.cat([torch.arange(c.start, c.stop, device=mesh.device) for c in chunks])


def stretch(batch: Batch, mesh: Mesh) -> Batch:
    """This rank's tokens of a batch, with the positions that they have in the whole sequence.

    Documents stay those of all tokens: attention wants to know what belongs to the keys of other ranks.
    """
    if mesh.layout.context == 1:
        return batch
    chunks = held_tokens(batch.tokens.shape[1], mesh.layout.context, mesh.index("context"), mesh.layout.balanced)

    def some(t: Tensor) -> Tensor:
        return torch.cat([t[:, c.start : c.stop] for c in chunks], 1)

    return replace(batch, tokens=some(batch.tokens), labels=some(batch.labels), positions=some(batch.positions))
