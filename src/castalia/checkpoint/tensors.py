"""Nested dicts of tensors -> one flat dict by canonical name; and the part of a tensor that a rank holds.

A `Piece` is a rectangle of a global tensor. It tells torch.distributed.checkpoint where it lies, so that
whatever spreads the weights (tensor parallelism, ZeRO, a pipeline, all of them) is one case for
saving and loading, and what was saved in pieces can be read in others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Piece:
    """A rectangle of a global tensor, held by this rank.

    Args:
        local: what is held.
        shape: of the whole tensor.
        offset: where the rectangle begins, by dimension.
    """

    def __init__(self, local: Tensor, shape: Sequence[int], offset: Sequence[int]) -> None:
        self.local, self.shape, self.offset = local, torch.Size(shape), torch.Size(offset)

    def detach(self) -> Piece:
        """The same rectangle, without gradients."""
        return Piece(self.local.detach(), self.shape, self.offset)

    def size(self) -> torch.Size:
        """Of the whole tensor."""
        return self.shape

    @property
    def region(self) -> tuple[slice, ...]:
        """Which part of the whole tensor this is."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.local.shape, strict=True))

    @torch.no_grad()
    def copy_(self, whole: Tensor) -> Piece:
        """Overwrite with this rectangle of a whole tensor."""
        self.local.copy_(whole[self.region])
        return self

    # What torch.distributed.checkpoint asks of a tensor that is spread over ranks.

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(name, c.offsets), WriteItemType.SHARD, None, TensorWriteData(c, properties, self.shape)
            )
            for c in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self.offset, self.local.shape)] if self.local.numel() else []


class PieceSavePlanner(DefaultSavePlanner):
    """torch's planner of what to write, which otherwise takes only its own tensors for parts of others."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """What an item of the plan refers to."""
        held = self.state_dict[index.fqn]
        return held.local if isinstance(held, Piece) else super().lookup_object(index)


class PieceLoadPlanner(DefaultLoadPlanner):
    """The same for reading."""

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Take the flat names as they are; torch's planner would take what is no tensor for nothing."""
        self.state_dict = self.original_state_dict = state_dict
        self.mappings, self.metadata, self.is_coordinator = {}, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """What an item of the plan is read into."""
        held: Any = self.state_dict[index.fqn]
        return held.local if isinstance(held, Piece) else super().lookup_tensor(index)


def flatten(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One flat dict; tensors are detached, not copied, so that writing into them writes into the originals.

    Raises:
        TypeError: something is not a tensor.
        ValueError: two tensors would have one name.
    """
    flat: dict[str, Any] = {}
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            part = flatten(value, f"{name}.")
        elif isinstance(value, Tensor | Piece):
            part = {name: value.detach()}
        else:
            raise TypeError(
                f"{name} is a {type(value).__name__}; a checkpoint's tensors are tensors, the rest is state"
            )
        if not flat.keys().isdisjoint(part):
            raise ValueError(f"two tensors are named {next(iter(flat.keys() & part.keys()))}")
        flat |= part
    return flat
