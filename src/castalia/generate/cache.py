"""Keys and values of the tokens so far -> one preallocated block that every layer appends to.

    keys, values: [layer][B, kv_heads, max_length, d]

    |<--- length: stored before this forward --->|<-- S new -->|        free        |
                                                  update() writes here and returns a view of
                                                  everything up to length + S

Preallocated because growing by concatenation copies the whole past at every token. The
length moves once per forward pass (`advance`), not per layer, so that all layers of one
pass see the same past.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers; satisfies `castalia.model.layers.Cache`.

    Args:
        num_layers: layers of the model.
        batch: sequences B that are generated together.
        kv_heads: key/value heads.
        max_length: most tokens per sequence, prompt included.
        head_dim: size d of a head.
        dtype: of keys and values; the dtype of the model's matrices.
        device: where they live.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, batch, kv_heads, max_length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
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
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` tokens as stored; called once after a forward pass of that many."""
        if self.length + count > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, not {self.length + count}")
        self.length += count

    def reset(self) -> None:
        """Forget everything; the memory is kept for the next batch."""
        self.length, self.positions = 0, None
