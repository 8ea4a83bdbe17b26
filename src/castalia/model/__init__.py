"""The model room: a plain nn.Module on one device, its initial weights, its loss and its size.

Names are resolved lazily, so that `castalia plan` can reckon sizes without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castalia.model.initial import initialise
    from castalia.model.loss import linear_cross_entropy
    from castalia.model.transformer import Transformer, build_model

_HOME = {
    "Transformer": "castalia.model.transformer",
    "build_model": "castalia.model.transformer",
    "initialise": "castalia.model.initial",
    "linear_cross_entropy": "castalia.model.loss",
}
__all__ = ["Transformer", "build_model", "initialise", "linear_cross_entropy"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
