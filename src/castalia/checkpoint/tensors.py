"""Nested dicts of tensors -> one flat dict by canonical name (keys joined by dots)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def flatten(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """One flat dict; tensors are detached, not copied, so that writing into them writes into the originals.

    Raises:
        TypeError: something is not a tensor.
        ValueError: two tensors would have one name.
    """
    flat: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            part = flatten(value, f"{name}.")
        elif isinstance(value, Tensor):
            part = {name: value.detach()}
        else:
            raise TypeError(
                f"{name} is a {type(value).__name__}; a checkpoint's tensors are tensors, the rest is state"
            )
        if not flat.keys().isdisjoint(part):
            raise ValueError(f"two tensors are named {next(iter(flat.keys() & part.keys()))}")
        flat |= part
    return flat
