"""Castalia: train autoregressive language models from scratch, and see that they are right.

The Python interface (docs/contracts.md, section 6) is imported lazily, so that
`import castalia` and `castalia --help` stay quick.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

# `generate` and `train` are rooms of their own that can be called.
_HOME = {
    "generate": ("castalia.generate", None),
    "load": ("castalia.generate.load", "load_run"),
    "train": ("castalia.train", None),
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        module, attribute = _HOME[name]
        found = import_module(module)
        return found if attribute is None else getattr(found, attribute)
    raise AttributeError(f"module 'castalia' has no attribute {name!r}")
