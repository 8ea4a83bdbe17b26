"""The generation room: KV cache, sampling, the engine, and loading a run to generate from.

Names are resolved lazily, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castalia.generate.cache import KVCache
    from castalia.generate.engine import Generation, generate
    from castalia.generate.load import load_run
    from castalia.generate.sampling import SamplingSettings

_HOME = {
    "Generation": "castalia.generate.engine",
    "KVCache": "castalia.generate.cache",
    "SamplingSettings": "castalia.generate.sampling",
    "generate": "castalia.generate.engine",
    "load_run": "castalia.generate.load",
}
__all__ = ["Generation", "KVCache", "SamplingSettings", "generate", "load_run"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
