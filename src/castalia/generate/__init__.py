"""The generation room: KV cache, sampling, the engine, and loading a run to generate from.

Names are resolved lazily, so that importing the package does not import torch. The room is
callable, so that `castalia.generate(model, tokenizer, ...)` stays what docs/contracts.md says.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
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


class _Room(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from castalia.generate.engine import generate

        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
