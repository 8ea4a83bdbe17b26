"""AdamW with moments of eight bits (Dettmers et al. 2021).

    moment ──blocks of 256, each over its largest──> nearest of 256 codes: 1 byte, + 4 bytes a block

Codes are the paper's dynamic ones: an exponent of base ten that takes as many bits as it needs, the rest a
linear fraction; -1 is one of them in place of the smallest negative, so that a block's largest is exact.
Vectors, embeddings and small tensors keep fp32 moments, as the paper has it for stability. Blocks follow the part
of a matrix that a rank holds, so layouts agree to eight bits only.
A checkpoint holds fp32 moments; reading them back gives the same codes, bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from castalia.optim.elementwise import Group, RecurrentOptimizer, State
from castalia.optim.matrix import adamw

BLOCK = 256
SMALL = 4096
"""Elements below which a tensor keeps fp32 moments."""

_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> signed


def codebook(signed: bool) -> Tensor:
    """The 256 values that codes stand for, ascending, fp32, from -1 (or 0) to 1."""
    values = []
    for exponent in range(7):
        count = 2 ** (exponent + (not signed))
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        values += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
    if signed:
        values += [-v for v in values[1:]] + [-1.0]
    return torch.tensor(sorted([*values, 0.0, 1.0]), dtype=torch.float32)


def pack(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Values of any shape -> uint8 codes (flat, padded to whole blocks) and the largest of each block, fp32."""
    flat = values.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks / torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    between = (codes[1:] + codes[:-1]) / 2
    return torch.bucketize(scaled, between).to(torch.uint8).view(-1), largest


def unpack(packed: tuple[Tensor, Tensor], codes: Tensor, shape: torch.Size) -> Tensor:
    """The values that codes and largest ones stand for, fp32."""
    blocks = codes[packed[0].long()].view(-1, BLOCK) * packed[1].unsqueeze(1)
    return blocks.view(-1)[: shape.numel()].view(shape)


class AdamW8bit(RecurrentOptimizer):
    """AdamW; between updates the moments of large matrices are packed.

    State holds fp32 moments after `unpack_states()` (for checkpoints) until the next update.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, **{"matrix": True, **defaults})
        self._codes: dict[tuple[torch.device, bool], Tensor] = {}

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        """See RecurrentOptimizer."""
        packs = group["matrix"] and parameter.numel() >= SMALL
        if packs:
            self._unpack(parameter, state)
        adamw(parameter, gradient, state, group)
        if packs:
            for name, signed in _MOMENTS.items():
                state[f"{name}_packed"] = pack(state.pop(name), self._book(parameter.device, signed))

    def unpack_states(self) -> None:
        """Give every parameter its fp32 moments, to be read or written."""
        for parameter, state in self.state.items():
            self._unpack(parameter, state)

    def _unpack(self, parameter: Tensor, state: State) -> None:
        for name, signed in _MOMENTS.items():
            if name in state:  # read from a checkpoint, or not packed yet: as good, and perhaps newer
                state.pop(f"{name}_packed", None)
            elif f"{name}_packed" in state:
                book = self._book(parameter.device, signed)
                state[name] = unpack(state.pop(f"{name}_packed"), book, parameter.shape)

    def _book(self, device: torch.device, signed: bool) -> Tensor:
        key = (device, signed)
        if key not in self._codes:
            self._codes[key] = codebook(signed).to(device)
        return self._codes[key]
