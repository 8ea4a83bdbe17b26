"""One sequence over several ranks: each holds a stretch of its tokens, and attention fetches the keys before them.

    rank c:  x of tokens [c S/C, (c+1) S/C) ─> q, k, v of these
             k, v ─gather over the ranks─> of all tokens ─cut─> of tokens [0, (c+1) S/C) ─core(past = c S/C)─> y

Everything else in a layer works on each token alone. Positions, masks and dropout are by a token's
number in the whole sequence, so that the result is that of one rank. Gradients of keys and values are
summed on the way back (a reduce-scatter). The ranks' work is uneven, since later queries see more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.model.attention import Core
from castalia.model.attention_mask import Drop, MaskSpec
from castalia.model.transformer import Transformer
from castalia.parallel.collectives import Group, gather_partial
from castalia.parallel.mesh import Mesh

TOKENS = 2  # dimension of the sequence in [B, heads, S, d]


class WholeKeys:
    """An attention core for queries of some tokens of a sequence whose other tokens are elsewhere.

    Args:
        core: that computes.
        group, rank: the ranks that share the sequence, and which this is.
    """

    def __init__(self, core: Core, group: Group, rank: int) -> None:
        self._core, self._group, self._rank = core, group, rank

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, drop: Drop | None = None, scale: float | None = None
    ) -> Tensor:
        """See castalia.model.attention.Core; q, k and v are of this rank's tokens."""
        mine = q.shape[TOKENS]
        past = self._rank * mine
        both = gather_partial(torch.stack([k, v]), TOKENS + 1, self._group)
        length = both.shape[TOKENS + 1]
        k, v = both[:, :, :, : past + mine].unbind()
        if "whole" not in mask.memo:
            bias = mask.bias
            if bias is not None:
                bias = replace(bias, keys=torch.arange(past + mine, device=q.device).unsqueeze(0))
            mask.memo["whole"] = replace(mask, past=past, bias=bias, dense=None, memo={})
        if drop is not None:
            drop = replace(drop, length=length)
        return self._core(q, k, v, cast(MaskSpec, mask.memo["whole"]), drop, scale)


def spread_sequence(model: Transformer, mesh: Mesh) -> None:
    """Give a model on the meta device attention that reaches the keys of other ranks, in place."""
    for block in cast(Any, model.layers):
        block.attention.core = WholeKeys(block.attention.core, mesh.group("context"), mesh.index("context"))


def stretch(batch: Batch, mesh: Mesh) -> Batch:
    """This rank's tokens of a batch, with the positions that they have in the whole sequence.

    Raises:
        UserError: its documents are kept apart.
    """
    ranks, rank = mesh.layout.context, mesh.index("context")
    if ranks == 1:
        return batch
    if batch.doc_ids is not None:
        raise UserError("documents that do not see each other need whole sequences: set parallel.context=1")
    each = batch.tokens.shape[1] // ranks
    mine = slice(rank * each, (rank + 1) * each)
    return replace(
        batch, tokens=batch.tokens[:, mine], labels=batch.labels[:, mine], positions=batch.positions[:, mine]
    )
