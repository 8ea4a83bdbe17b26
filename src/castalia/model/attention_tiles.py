"""Attention in tiles: a few queries against the keys that they can see, and nothing else is computed or stored.

    keys   ▓                     MaskSpec ──plan──> tiles (rows, columns) ──one fused call each──> out
    ▲      ▓▓                    backward: the same tiles, gradients of keys and values summed in place
    │      ·▓▓
    │      ··▓▓   window         time and memory grow with the live blocks, not with S^2
    └──> queries

A tile is some rows of the batch, some heads, a range of queries and the keys any of them sees, by a
range or by number. Documents are cut apart, so that a tile never crosses from one to another and
blocks are counted from where its document starts. On CPUs a tile is one call of torch's flash
attention; where that cannot serve (dropout by our counters, gradients of a bias table, another
device) it is computed step by step, and computed again in backward, so that no probabilities are kept.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from castalia.model.attention_mask import Drop, MaskSpec, Part
from castalia.model.norms import wide

ROWS = 64, 256
"""Queries of a tile, at least and at most: more of them share their keys, fewer see less of each other's."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Tile(NamedTuple):
    """One call: which rows of the batch, heads, queries and keys; `start` is where their document begins.

    `triangle`: the queries are all the keys, and see those before them: no mask is needed. `hidden`:
    the mask, where tiles share one.
    """

    batch: slice
    heads: slice
    rows: slice
    columns: Part
    start: int
    triangle: bool = False
    hidden: Tensor | None = None


@torch.compiler.disable
def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, drop: Drop | None = None, scale: float | None = None
) -> Tensor:
    """Attention by tiles; the arguments are those of `castalia.model.attention.attend`."""
    key = f"tiles/{q.shape[1]}/{q.shape[2]}/{k.shape[2]}/{drop is not None}"
    if key not in mask.memo:
        fused = q.device.type == "cpu" and drop is None
        mask.memo[key] = plan(mask, q.shape[1], q.shape[2], k.shape[2], q.device, fused)
    table = None if mask.bias is None else mask.bias.table
    out: Tensor = _Tiled.apply(q, k, v, table, mask, mask.memo[key], drop, scale or 1 / math.sqrt(q.shape[-1]))
    return out


def plan(
    mask: MaskSpec, heads: int, queries: int, keys: int, device: torch.device | str, fused: bool = True
) -> list[Tile]:
    """The tiles that cover every query once, each with all the keys that one of its queries sees.

    `fused`: the kernel skips the upper triangle by itself, so a document without a pattern is one tile.
    """
    everything = slice(None)
    if mask.documents is None:
        spans = [(everything, 0, keys)]
    else:
        spans = [
            (slice(b, b + 1), start, min(end, keys))
            for b, row in enumerate(mask.documents.spans())
            for start, end in row
            if end > mask.past and start < keys
        ]
    parts = [everything]
    if mask.layout is not None and len(mask.layout.live(1)) > 1:
        parts = [slice(head, head + 1) for head in range(heads)]
    hidden: dict[tuple[int, int, int], Tensor] = {}
    return [
        tile
        for batch, start, end in spans
        for part in parts
        for tile in _span(mask, batch, part, (start, end), device, hidden, fused)
    ]


def _span(
    mask: MaskSpec,
    batch: slice,
    heads: slice,
    span: tuple[int, int],
    device: torch.device | str,
    shared: dict[tuple[int, int, int], Tensor],
    fused: bool,
) -> list[Tile]:
    """Tiles of the queries among the tokens of one document; tiles of a window share their masks."""
    tiles, layout, (start, end) = [], mask.layout, span
    first = max(start, mask.past)
    if fused and first == start and mask.plain_within(end - start):
        return [Tile(batch, heads, slice(start - mask.past, end - mask.past), slice(start, end), start, True)]
    size, live = ROWS[0], None
    if layout is not None:
        size = layout.block * max(1, ROWS[0] // layout.block)
        live = layout.live(end - start)[heads.start or 0]
    elif fused and mask.window is not None:
        size = min(max(mask.window // 4, ROWS[0]), ROWS[1])
    # Tiles begin at multiples of their size from the start of the document, as blocks do.
    for low in range(start + (first - start) // size * size, end, size):
        a, e = max(low, first), min(low + size, end)
        columns: Part = slice(start if mask.window is None else max(start, a - mask.window + 1), e)
        if layout is not None and live is not None:
            columns = _live_columns(live, layout.block, a - start, e - start, device, start)
        rows, seen = slice(a - mask.past, e - mask.past), None
        if layout is None and mask.bias is None and isinstance(columns, slice):
            shape = (a - columns.start, e - a, e - columns.start)
            if shape not in shared:
                shared[shape] = _additive(mask, torch.arange(a, e), torch.arange(columns.start, e), start, 0).to(device)
            seen = shared[shape]
        tiles.append(Tile(batch, heads, rows, columns, start, False, seen))
    return tiles


def _live_columns(live: Tensor, block: int, first: int, last: int, device: torch.device | str, start: int) -> Part:
    """Tokens in the blocks that the rows first .. last - 1 of a document see, as a range where they are one."""
    chosen = live[first // block : -(-last // block)].any(0).nonzero().squeeze(1)
    if len(chosen) == int(chosen[-1] - chosen[0]) + 1:
        return slice(start + int(chosen[0]) * block, start + min((int(chosen[-1]) + 1) * block, last))
    tokens = (chosen.unsqueeze(1) * block + torch.arange(block)).flatten()
    return (start + tokens[tokens < last]).to(device)


def _additive(mask: MaskSpec, rows: Tensor, columns: Tensor, start: int, head: int) -> Tensor:
    """fp32 `[R, C]`, 0 or -inf."""
    seen = mask.seen(rows, columns, start, head)
    return torch.zeros(seen.shape, device=rows.device).masked_fill(~seen, -math.inf)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor | None,
        mask: MaskSpec,
        tiles: list[Tile],
        drop: Drop | None,
        scale: float,
    ) -> Tensor:
        # In the order of memory that the projections want: heads side by side.
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        ctx.fused = q.device.type == "cpu" and drop is None and not ctx.needs_input_grad[3]
        sums = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)) if ctx.fused else None
        for tile in tiles:
            part = _Part(tile, mask, q, k, v)
            if sums is not None:
                y, z = _flash(*part.qkv, 0.0, tile.triangle, attn_mask=part.bias(q.dtype), scale=scale)
                part.put(sums.unsqueeze(-1), z.unsqueeze(-1))
            else:
                y = _step_by_step(*part.qkv, table, part, drop, scale)
            part.put(out, y)
        ctx.save_for_backward(q, k, v, table, out, sums)
        ctx.mask, ctx.tiles, ctx.drop, ctx.scale = mask, tiles, drop, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table, out, sums = ctx.saved_tensors
        dq = torch.empty_like(q)
        # Tiles that share keys add to their gradients: in fp32, as the fused kernels sum inside.
        dk, dv = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (k, v))
        d_table = torch.zeros_like(table) if ctx.needs_input_grad[3] else None
        for tile in ctx.tiles:
            part = _Part(tile, ctx.mask, q, k, v)
            g = part.rows(grad)
            if sums is not None:
                y, z = part.rows(out), part.rows(sums.unsqueeze(-1)).squeeze(-1)
                bias = part.bias(q.dtype)
                grads = _flash_backward(g, *part.qkv, y, z, 0.0, tile.triangle, attn_mask=bias, scale=ctx.scale)
            else:
                with torch.enable_grad():
                    leaves = [t.detach().requires_grad_() for t in part.qkv]
                    own = None if d_table is None else table.detach().requires_grad_()
                    y = _step_by_step(leaves[0], leaves[1], leaves[2], own, part, ctx.drop, ctx.scale)
                    grads = torch.autograd.grad(y, leaves + ([] if own is None else [own]), g)
                if d_table is not None:
                    d_table += grads[3]
            part.put(dq, grads[0])
            part.add(dk, grads[1])
            part.add(dv, grads[2])
        return dq, dk.to(k.dtype), dv.to(v.dtype), d_table, None, None, None, None


class _Part:
    """A tile's share of the tensors.

    Query heads that share a key/value head are stacked as further rows of its product: queries are
    `[b, k, g R, d]`, keys and values `[b, k, C, d]`. A triangle needs its rows in order, so there the
    keys are repeated instead.
    """

    def __init__(self, tile: Tile, mask: MaskSpec, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.tile, self.mask = tile, mask
        self.group = q.shape[1] // k.shape[1]
        self.kv_heads, self.stacked, self.repeated = tile.heads, 1, 1
        if tile.heads.start is not None:  # one head
            shared = tile.heads.start // self.group
            self.kv_heads = slice(shared, shared + 1)
        elif tile.triangle:
            self.repeated = self.group
        else:
            self.stacked = self.group
        self.device = q.device
        self.qkv = self.rows(q), self._columns(k), self._columns(v)

    def rows(self, t: Tensor) -> Tensor:
        """This tile's `[b, k, g R, d]` of `[B, n, S, d]`."""
        some = t[self.tile.batch, self.tile.heads, self.tile.rows]
        if self.stacked == 1:
            return some
        b, n, r, d = some.shape
        return some.reshape(b, n // self.stacked, self.stacked * r, d)

    def _columns(self, t: Tensor) -> Tensor:
        some = t[self.tile.batch, self.kv_heads]
        columns = self.tile.columns
        some = some[:, :, columns] if isinstance(columns, slice) else some.index_select(2, columns)
        return some if self.repeated == 1 else some.repeat_interleave(self.repeated, 1)

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write `[b, k, g R, d]` to its place in `[B, n, S, d]`."""
        place = whole[self.tile.batch, self.tile.heads, self.tile.rows]
        place.copy_(part.reshape(place.shape))

    def add(self, whole: Tensor, part: Tensor) -> None:
        """Add `[b, k, C, d]` to its place in `[B, k, T, d]`."""
        if self.repeated > 1:
            part = part.unflatten(1, (-1, self.repeated)).sum(2)
        place, columns = whole[self.tile.batch, self.kv_heads], self.tile.columns
        if isinstance(columns, slice):
            place[:, :, columns] += part
        else:
            place.index_add_(2, columns, part.to(place.dtype))

    def places(self) -> tuple[Tensor, Tensor]:
        """Numbers of the tokens of this tile's queries and keys."""
        past, rows, columns = self.mask.past, self.tile.rows, self.tile.columns
        i = torch.arange(rows.start + past, rows.stop + past, device=self.device)
        if isinstance(columns, slice):
            columns = torch.arange(columns.start, columns.stop, device=self.device)
        return i, columns

    def bias(self, dtype: torch.dtype, table: Tensor | None = None) -> Tensor | None:
        """What is added to the scores: `[1, 1, g R, C]` or `[1 or b, k, g R, C]`; None for a triangle."""
        if self.tile.triangle:
            return None
        hidden = self.tile.hidden
        if hidden is None:
            hidden = _additive(self.mask, *self.places(), self.tile.start, self.tile.heads.start or 0)
        if self.mask.bias is None:
            hidden = hidden.repeat(self.stacked, 1) if self.stacked > 1 else hidden
            return hidden.to(torch.promote_types(dtype, torch.float32)).view(1, 1, *hidden.shape)
        bias = self.mask.bias if table is None else self.mask.bias.with_table(table)
        added = bias.part(self.tile.batch, self.tile.heads, self.tile.rows, self.tile.columns) + hidden
        shape = added.shape[0], added.shape[1] // self.stacked, self.stacked * added.shape[2], added.shape[3]
        return added.reshape(shape).to(torch.promote_types(dtype, torch.float32))


def _step_by_step(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, part: _Part, drop: Drop | None, scale: float
) -> Tensor:
    """One tile without a fused kernel: the softmax in fp32, differentiable in all four tensors."""
    rows, columns = part.places()
    scores = wide(q @ k.transpose(-1, -2)) * scale
    bias = part.bias(q.dtype, table)
    if bias is None:
        bias = _additive(MaskSpec(), rows, columns, 0, 0)
    probabilities = (scores + bias).softmax(-1)
    if drop is not None:
        apart = probabilities.reshape(q.shape[0], -1, len(rows), len(columns))
        probabilities = drop(apart, part.tile.batch, part.tile.heads, rows, columns).view_as(probabilities)
    return probabilities.to(v.dtype) @ v
