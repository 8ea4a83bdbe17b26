"""What queries may see, described rather than stored: the interface between a model and an attention core.

    config, positions, doc_ids ──> MaskSpec ──core(q, k, v, mask, ...)──> [B, n, S, d]

A core (`castalia.model.attention.attend`, a user's own, or one that spreads a sequence over ranks)
gets a description: causal always, and on top of that a window, a layout of live blocks, documents
that do not see each other, and a bias of positions. A description costs nothing at any length;
`dense` holds the same as one matrix where the sequence is short enough for that to be quicker.

Token i sees token j <= i where i - j < window, the layout's block of (i, j) is live, counted from
the start of their document, and both belong to one document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from castalia.config import ModelConfig, mup
from castalia.config.attention import GATED_MLPS
from castalia.model.attention_layouts import LAYOUTS, RANDOM, BlockLayout
from castalia.model.dropout import DropoutKey, drop_elements
from castalia.model.positions import alibi_bias, alibi_slopes, relative_bias

Part = slice | Tensor
"""Some of a dimension: a range, or int64 places."""

DENSE_LENGTH = 256
"""Sequences up to this length take their mask as one matrix, which is quicker than many small calls."""
DENSE_BIAS_LENGTH = 1024
"""The same where a bias is all there is, as it is computed once for all layers."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Which tokens belong together: a document is a run of equal ids.

    Attributes:
        starts: int64 `[B, T]`, for each token the place of its document's first token; of all tokens of the
            sequence, where the queries are those of some.
    """

    starts: Tensor
    host_starts: Tensor
    """The same where the ids were given: on the CPU, if nothing is to wait for a device."""

    @classmethod
    def of(cls, doc_ids: Tensor, device: torch.device | str) -> Documents:
        """From ids `[B, S]`, for a model on `device`."""
        place = torch.arange(doc_ids.shape[1], device=doc_ids.device)
        new = torch.ones_like(doc_ids, dtype=torch.bool)
        new[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
        starts = torch.where(new, place, 0).cummax(1).values
        return cls(starts.to(device, non_blocking=True), starts)

    def spans(self) -> list[list[tuple[int, int]]]:
        """For each row the first token of each document and the one after its last."""
        length = self.starts.shape[1]
        firsts = [row.unique_consecutive().tolist() for row in self.host_starts.cpu()]
        return [list(zip(row, [*row[1:], length], strict=True)) for row in firsts]


@dataclass(frozen=True, eq=False)
class ScoreBias:
    """What positions add to the scores.

    Attributes:
        queries: int64 position ids `[1 or B, S]`.
        keys: int64 position ids `[1 or B, T]`.
        slopes: fp32 `[n]` of ALiBi, or None.
        table: `[buckets, n]` of T5's relative bias, or None; exactly one of the two is there.
        furthest: of the table: distances from here on share the last bucket.
        head_size: of the table: the bias is multiplied by its root (with muP: the base model's).
    """

    queries: Tensor
    keys: Tensor
    slopes: Tensor | None = None
    table: Tensor | None = None
    furthest: int = 128
    head_size: float = 1

    def part(self, batch: slice, heads: slice, rows: Part, columns: Part) -> Tensor:
        """fp32 `[1 or b, heads, rows, columns]`, of some rows of the batch, heads, queries and keys."""
        queries, keys = (p if p.shape[0] == 1 else p[batch] for p in (self.queries, self.keys))
        distance = queries[:, rows].unsqueeze(-1) - keys[:, columns].unsqueeze(-2)
        if self.table is None:
            assert self.slopes is not None
            return alibi_bias(distance, self.slopes[heads])
        return relative_bias(distance, self.table[:, heads], self.furthest, self.head_size)

    def with_table(self, table: Tensor) -> ScoreBias:
        """The same, read from another table."""
        return replace(self, table=table)

    def heads(self, first: int, count: int) -> ScoreBias:
        """The bias of some heads alone."""
        some = slice(first, first + count)
        return replace(
            self,
            slopes=None if self.slopes is None else self.slopes[some],
            table=None if self.table is None else self.table[:, some],
        )


@dataclass(eq=False)
class MaskSpec:
    """What the queries of one forward pass may see in one kind of layer.

    Attributes:
        kind: `global`, `window` or a block-sparse kind, as the configuration names it.
        past: keys before the first query's own; query row r is token past + r.
        window: keys that a query sees at most, its own included; None: all earlier ones.
        layout: the live blocks; None: all.
        documents: None: all one document.
        bias: None: positions enter otherwise.
        dense: all of this as an additive fp32 matrix `[1 or B, 1 or n, S, T]`, -inf where nothing is to
            be seen; None: not built.
    """

    kind: str = "global"
    past: int = 0
    window: int | None = None
    layout: BlockLayout | None = None
    documents: Documents | None = None
    bias: ScoreBias | None = None
    dense: Tensor | None = None
    memo: dict[str, Any] = field(default_factory=dict, repr=False)
    """What a core works out from the description once, for all layers that share it."""

    def plain(self, tokens: int) -> bool:
        """Whether nothing but causality is asked for among so many tokens."""
        return self.plain_within(tokens) and self.documents is None

    def plain_within(self, tokens: int) -> bool:
        """The same inside one document of so many tokens."""
        narrow = self.window is not None and self.window < tokens
        return not narrow and self.layout is None and self.bias is None

    def better_dense(self, queries: int, keys: int) -> bool:
        """Whether the whole matrix is worth building."""
        narrow = self.window is not None and self.window < keys
        patterned = narrow or self.layout is not None or self.documents is not None
        most = DENSE_BIAS_LENGTH if self.bias is not None and not patterned else DENSE_LENGTH
        return queries * keys <= most**2

    def heads(self, first: int, count: int) -> MaskSpec:
        """The description for `count` heads from `first` on: for a rank that holds these."""
        dense = self.dense
        if dense is not None and dense.shape[1] > 1:
            dense = dense[:, first : first + count]
        return replace(
            self,
            layout=None if self.layout is None else self.layout.heads(first, count),
            bias=None if self.bias is None else self.bias.heads(first, count),
            dense=dense,
            memo={},
        )

    def seen(self, rows: Tensor, columns: Tensor, start: int = 0, head: int = 0) -> Tensor:
        """bool `[R, C]`: which tokens `columns` the tokens `rows` see, all of one document that begins at `start`."""
        i, j = rows.unsqueeze(-1), columns.unsqueeze(-2)
        seen = j <= i
        if self.window is not None:
            seen = seen & (i - j < self.window)
        if self.layout is not None:
            live = self.layout.live(int(rows.max()) + 1 - start)[head].to(rows.device)
            # Two selections of whole rows and columns are many times quicker than one by pairs of numbers.
            i, j = ((p - start).div(self.layout.block, rounding_mode="floor") for p in (rows, columns))
            seen = seen & live.index_select(0, i).index_select(1, j)
        return seen

    def matrix(self, queries: int, keys: int, device: torch.device | str) -> Tensor:
        """All of the description as `dense`, for so many queries and keys."""
        rows, columns = torch.arange(self.past, self.past + queries, device=device), torch.arange(keys, device=device)
        i, j = rows.unsqueeze(-1), columns.unsqueeze(-2)
        seen = (j <= i).view(1, 1, queries, keys)
        if self.window is not None:
            seen = seen & (i - j < self.window)
        i, j = rows.unsqueeze(0), columns.unsqueeze(0)
        if self.documents is not None:
            starts = self.documents.starts
            of_rows, of_columns = starts[:, self.past : self.past + queries], starts[:, :keys]
            seen = seen & (of_rows.unsqueeze(-1) == of_columns.unsqueeze(-2)).unsqueeze(1)
            i, j = i - of_rows, j - of_columns
        if self.layout is not None:
            live = self.layout.live(keys).to(device)
            i, j = (p.div(self.layout.block, rounding_mode="floor") for p in (i, j))
            seen = seen & live[:, i.unsqueeze(-1), j.unsqueeze(-2)].transpose(0, 1)
        everything = slice(None)
        if self.bias is None:
            bias = torch.zeros((), device=device)
        else:
            bias = self.bias.part(everything, everything, everything, everything)
        return bias.masked_fill(~seen, -math.inf)


@dataclass(frozen=True)
class Drop:
    """Dropout of attention probabilities, by the number of each element and not by who computes it.

    Attributes:
        key: which masks.
        share: how many are dropped.
        layer: the executed layer.
        length: tokens of the whole sequence, by which rows are counted: head x length + query.
        first_head: number of the first head, where a rank holds only some.
    """

    key: DropoutKey
    share: float
    layer: int
    length: int
    first_head: int = 0

    def __call__(self, x: Tensor, batch: slice, heads: slice, rows: Tensor, columns: Tensor) -> Tensor:
        """Drop from probabilities `[b, heads, R, C]`; int64 rows `[R]`, columns `[C]` are numbers of tokens."""
        head = torch.arange(x.shape[1], device=x.device) + (self.first_head + (heads.start or 0))
        numbers = (head.unsqueeze(-1) * self.length + rows).flatten()
        return drop_elements(x, self.share, self.key, "probabilities", self.layer, numbers, columns, batch)


class Masks:
    """The descriptions for all layers of a model, made anew for each forward pass.

    Layouts are kept, as they depend on the configuration alone. Not a module: it has no parameters.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        self._cfg = cfg
        self.matrices = True
        """Short sequences get their mask as a matrix; not where a core describes them anew (context parallelism)."""
        layouts: dict[tuple[str, int], BlockLayout] = {}
        self.layers: list[tuple[str, BlockLayout | None]] = []
        for layer, kind in enumerate(cfg.attention_kinds):
            layout = None
            if kind in LAYOUTS:
                key = kind, layer if kind in RANDOM else 0
                layout = layouts.setdefault(key, BlockLayout(cfg, kind, layer))
            self.layers.append(("global-gate" if kind in GATED_MLPS else kind, layout))

    def describe(
        self, past: int, positions: Tensor, keys: Tensor, table: Tensor | None, documents: Documents | None
    ) -> tuple[MaskSpec, ...]:
        """One description for each executed layer; layers that see the same share one.

        Args:
            past: tokens in the cache.
            positions, keys: position ids `[1 or B, S]` and `[1 or B, past + S]`; used by biases alone.
            table: of T5's relative bias.
            documents: None: each row is one.
        """
        cfg, bias = self._cfg, None
        if cfg.position == "alibi":
            slopes = torch.tensor(alibi_slopes(cfg.num_attention_heads), device=positions.device)
            bias = ScoreBias(positions, keys, slopes)
        elif table is not None:
            bias = ScoreBias(positions, keys, None, table, cfg.rpe_max_distance, mup.base_head_size(cfg))
        made: dict[tuple[str, int], MaskSpec] = {}
        for kind, layout in self.layers:
            if (kind, id(layout)) not in made:
                window = cfg.attention_window if kind == "window" else None
                mask = MaskSpec(kind.removesuffix("-gate"), past, window, layout, documents, bias)
                if kind == "global-gate":
                    mask.bias = None
                tokens, total = positions.shape[-1], past + positions.shape[-1]
                if self.matrices and not mask.plain(total) and mask.better_dense(tokens, total):
                    mask.dense = mask.matrix(tokens, total, positions.device)
                made[kind, id(layout)] = mask
        return tuple(made[kind, id(layout)] for kind, layout in self.layers)
