"""A sparse kind of attention -> which blocks of keys each block of queries sees: bool [heads, N, N].

    local            the block itself and those before it, `attention_local_blocks` in all
    sparse_fixed     windows of blocks side by side, and the last blocks of every earlier window    Child et al. 2019
    sparse_variable  windows of the listed sizes, listed columns, and columns drawn at random       DeepSpeed
    bigbird          a sliding window, the first columns, and columns drawn at random               Zaheer et al. 2020
    bslongformer     a sliding window and the listed columns and rows                               Beltagy et al. 2020

Blocks are counted from the start of a document, and whatever comes later is masked. A row depends
on its own number alone, never on how long the sequence is, so that a continuation with a cache sees
what a whole forward pass sees; random columns are drawn from those that a row can see, by a hash of
(seed, layer, head, row). GPT-NeoX draws from a global generator, also columns that are masked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from castalia.config import ModelConfig

Rule = Callable[[ModelConfig, int, int, int], Tensor]
"""(configuration, layer, head, N) to bool `[N, N]`; what lies above the diagonal does not count."""


class BlockLayout:
    """The live blocks of one layer, for any length.

    Args:
        cfg: of the model.
        kind: one of LAYOUTS.
        layer: number of the executed layer, on which random columns depend.

    Attributes:
        block: tokens of a block.
    """

    def __init__(self, cfg: ModelConfig, kind: str, layer: int) -> None:
        self.block, self._cfg, self._rule, self._layer = cfg.attention_block, cfg, LAYOUTS[kind], layer
        self._heads = range(cfg.num_attention_heads) if cfg.attention_per_head and kind in PER_HEAD else range(1)
        self._live = torch.zeros(len(self._heads), 0, 0, dtype=torch.bool)

    @torch.compiler.disable
    def live(self, tokens: int) -> Tensor:
        """bool `[1 or n, N, N]` on the CPU, N blocks holding at least `tokens`; one layout where all heads share it."""
        blocks = -(-tokens // self.block)
        if blocks > self._live.shape[1]:
            lower = torch.ones(blocks, blocks, dtype=torch.bool).tril()
            layouts = [self._rule(self._cfg, self._layer, head, blocks) & lower for head in self._heads]
            self._live = torch.stack(layouts)
        return self._live[:, :blocks, :blocks]

    def heads(self, first: int, count: int) -> BlockLayout:
        """The layout of some heads alone, for a rank that holds these."""
        if len(self._heads) == 1:
            return self
        part = object.__new__(BlockLayout)
        part.__dict__.update(self.__dict__, _heads=self._heads[first : first + count], _live=self._live[:, :0, :0])
        part._live = self._live[first : first + count]
        return part


def _places(blocks: int) -> tuple[Tensor, Tensor]:
    place = torch.arange(blocks)
    return place[:, None], place[None, :]


def _local(cfg: ModelConfig, layer: int, head: int, blocks: int) -> Tensor:
    i, j = _places(blocks)
    return i - j < cfg.attention_local_blocks


def _fixed(cfg: ModelConfig, layer: int, head: int, blocks: int) -> Tensor:
    i, j = _places(blocks)
    size, globals_ = cfg.attention_local_blocks, cfg.attention_global_blocks
    first = size - (1 + head % cfg.attention_global_patterns) * globals_
    return (i // size == j // size) | ((j % size >= first) & (j % size < first + globals_))


def _variable(cfg: ModelConfig, layer: int, head: int, blocks: int) -> Tensor:
    window: list[int] = []
    for number_of, size in enumerate(cfg.attention_window_blocks):
        window += [number_of] * size
    last = cfg.attention_window_blocks[-1]
    more = blocks - len(window)
    window += [len(cfg.attention_window_blocks) + rest // last for rest in range(more)]
    number = torch.tensor(window[:blocks])
    same = number[:, None] == number[None, :]
    return same | _global_columns(cfg, blocks) | _random_columns(cfg, layer, head, blocks, 0)


def _bigbird(cfg: ModelConfig, layer: int, head: int, blocks: int) -> Tensor:
    i, j = _places(blocks)
    ends = (i < cfg.attention_global_blocks) | (j < cfg.attention_global_blocks)
    return (i - j <= cfg.attention_sliding_blocks // 2) | ends | _random_columns(cfg, layer, head, blocks, 1)


def _bslongformer(cfg: ModelConfig, layer: int, head: int, blocks: int) -> Tensor:
    i, j = _places(blocks)
    columns = _global_columns(cfg, blocks)
    return (i - j <= cfg.attention_sliding_blocks // 2) | columns | columns.T


def _global_columns(cfg: ModelConfig, blocks: int) -> Tensor:
    """bool `[1, N]`: the listed columns, or the ranges of columns where ends are listed too."""
    chosen = torch.zeros(1, blocks, dtype=torch.bool)
    starts = cfg.attention_global_starts
    for start, end in zip(starts, cfg.attention_global_ends or [s + 1 for s in starts], strict=True):
        chosen[:, start:end] = True
    return chosen


def _random_columns(cfg: ModelConfig, layer: int, head: int, blocks: int, default: int) -> Tensor:
    wanted = default if cfg.attention_random_blocks is None else cfg.attention_random_blocks
    out = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks if wanted else 0):
        chosen: set[int] = set()
        draw = 0
        while len(chosen) < min(wanted, row + 1):
            text = f"{cfg.attention_seed}/blocks/{layer}/{head}/{row}/{draw}"
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            chosen.add(int.from_bytes(digest, "little") % (row + 1))
            draw += 1
        out[row, list(chosen)] = True
    return out


LAYOUTS: dict[str, Rule] = {
    "local": _local,
    "sparse_fixed": _fixed,
    "sparse_variable": _variable,
    "bigbird": _bigbird,
    "bslongformer": _bslongformer,
}
RANDOM = ("sparse_variable", "bigbird")
"""Kinds whose layout can differ between layers."""
PER_HEAD = ("sparse_fixed", "sparse_variable", "bigbird")
"""Kinds whose layout can differ between heads."""
