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

    def reset(self) -> None:
        """Forget everything; the memory is kept for the next batch."""
        self.length, self.positions = 0, None
