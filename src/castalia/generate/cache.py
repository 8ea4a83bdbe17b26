"""Keys and values of the tokens so far -> one preallocated block that every layer appends to.

    keys, values: [layer] of [B, kv_heads, max_length, d]

    |<--- length: stored before this forward --->|<-- S new -->|        free        |
                                                  update() writes here and returns a view of
                                                  everything up to length + S

Preallocated because growing by concatenation copies the whole past at every token. The
length moves once per forward pass (`advance`), not per layer, so that all layers of one
pass see the same past. A layer's block is made when the layer first stores something, in the shape
of that: a layer without attention keeps other things than keys and values of heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers; satisfies `castalia.model.layers.Cache`.

    Args:
        num_layers: layers of the model.
        max_length: most tokens per sequence, prompt included.
        dtype: of keys and values; the dtype of the model's matrices.
        device: where they live.
    """

    def __init__(
        self,
        num_layers: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._stored: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._dtype, self._device = dtype, device
        self.max_length = max_length
        self.length = 0
        """Tokens stored by earlier forward passes."""
        self.positions: Tensor | None = None
        """Their position ids `[1 or B, length]`, noted by models that score by distance."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values.

        Args:
            layer: index of the layer.
            k, v: `[B, kv_heads, S, d]`, rotated already.

        Returns:
            Views `[B, kv_heads, length + S, d]` of everything stored, the new tokens last.

        Raises:
            ValueError: the cache is full.
        """
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens and was given {end}: make it longer")
        stored = self._stored[layer]
        if stored is None:
            keys, values = (
                torch.empty(*t.shape[:2], self.max_length, t.shape[3], dtype=self._dtype, device=self._device)
                for t in (k, v)
            )
            stored = self._stored[layer] = (keys, values)
        keys, values = stored
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` tokens as stored; called once after a forward pass of that many."""
        if self.length + count > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, not {self.length + count}")
        self.length += count

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the old ones, in this order."""
        self._stored = _rows_of(self._stored, rows)
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions[rows]

    def reset(self) -> None:
        """Forget everything; the memory is kept for the next batch."""
        self.length, self.positions = 0, None


def _rows_of(stored: list[tuple[Tensor, Tensor] | None], rows: Tensor) -> list[tuple[Tensor, Tensor] | None]:
    return [None if s is None else (s[0].index_select(0, rows), s[1].index_select(0, rows)) for s in stored]


class RowCache:
    """Keys and values of rows that are at different places, for one token at a time after a prefill.

        full     slot of position p is p                 [B, kv_heads, max_length, d]
        window   slot of position p is p mod window      [B, kv_heads, window, d]      a ring

    A prompt is stored at its row's own positions, so that no slot is lost to padding; a layer with a
    window keeps no more than it can see. Satisfies `castalia.model.layers.Cache`.

    Args:
        windows: for each executed layer how many keys it sees; None: all.
        max_length: most tokens per sequence, prompt included.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.slots = [max_length if w is None else min(w, max_length) for w in windows]
        self._stored: list[tuple[Tensor, Tensor] | None] = [None] * len(windows)
        self._dtype, self._device = dtype, device
        self.max_length = max_length
        self.positions: Tensor | None = None
        self.lengths: list[int] = []
        """Tokens stored of each row."""
        self.started = False
        """Whether the prompts are stored."""
        self.length = 0
        """Tokens stored of the longest row."""
        self.even = True
        """Whether all rows are at the same place."""

    def begin(self, lengths: Sequence[int]) -> None:
        """Forget everything: the next forward pass brings prompts of these lengths, padded at their ends."""
        if max(lengths) > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens and was given {max(lengths)}: make it longer")
        if self._stored and any(s is not None and s[0].shape[0] != len(lengths) for s in self._stored):
            self._stored = [None] * len(self._stored)
        self.lengths, self.length, self.started, self.positions = list(lengths), 0, False, None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store prompts `[B, kv_heads, S, d]`, or one token of each row, at its place.

        Returns:
            For prompts what was given; else views `[B, kv_heads, T, d]` of the slots in use, in the order of the
            slots; what they hold beyond a row's own place is not for it to see.
        """
        stored = self._stored[layer]
        if stored is None:
            keys, values = (
                torch.zeros(*t.shape[:2], self.slots[layer], t.shape[3], dtype=self._dtype, device=self._device)
                for t in (k, v)
            )
            stored = self._stored[layer] = (keys, values)
        keys, values = stored
        slots = self.slots[layer]
        if not self.started:
            self._store_prompts(keys, values, k, v, slots)
            return k, v
        if self.even:
            slot = self.lengths[0] % slots
            keys[:, :, slot] = k[:, :, 0]
            values[:, :, slot] = v[:, :, 0]
        else:
            rows, where = self._rows, self._places % slots
            keys[rows, :, where] = k[:, :, 0].to(self._dtype)
            values[rows, :, where] = v[:, :, 0].to(self._dtype)
        used = min(self.length + 1, slots)
        return keys[:, :, :used], values[:, :, :used]

    def _store_prompts(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: int) -> None:
        if k.shape[2] <= slots:  # what is padding will be overwritten before it can be seen
            keys[:, :, : k.shape[2]] = k
            values[:, :, : k.shape[2]] = v
            return
        for row, length in enumerate(self.lengths):
            kept = torch.arange(max(length - slots, 0), length, device=k.device)
            keys[row, :, kept % slots] = k[row, :, kept].to(self._dtype)
            values[row, :, kept % slots] = v[row, :, kept].to(self._dtype)

    def advance(self, count: int) -> None:
        """After the prompts' forward pass (count: any), or after one token of each row (count 1)."""
        if self.started:
            if self.length + 1 > self.max_length:
                raise ValueError(f"the cache holds {self.max_length} tokens, not {self.length + 1}")
            self.lengths = [n + 1 for n in self.lengths]
        self.started, self.length = True, max(self.lengths)
        self.even = min(self.lengths) == self.length
        self._places = torch.tensor(self.lengths, device=self._device)
        self._rows = torch.arange(len(self.lengths), device=self._device)

    @property
    def places(self) -> Tensor:
        """int64 `[B]`: where each row's next token goes."""
        return self._places

    def key_positions(self, slots: int) -> Tensor:
        """int64 `[B, T]`: which position each used slot holds once the next token is stored; -1 or less: none."""
        slot = torch.arange(min(self.length + 1, slots), device=self._device)
        place = self._places.unsqueeze(-1)
        if slots == self.max_length:
            return torch.where(slot <= place, slot, -1)
        return place - (place - slot) % slots

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the old ones, in this order (some may come twice, some not at all)."""
        self._stored = _rows_of(self._stored, rows)
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.length = max(self.lengths)
        self.even = min(self.lengths) == self.length
        self._places, self._rows = self._places[rows], torch.arange(len(rows), device=self._device)
