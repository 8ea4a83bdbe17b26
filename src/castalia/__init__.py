"""Castalia: train autoregressive language models from scratch, and see that they are right.

The Python interface (docs/contracts.md, section 6) is imported lazily, so that
`import castalia` and `castalia --help` stay quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castalia.generate import generate
    from castalia.generate import load_run as load
    from castalia.train.run import train

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load", "train"]

_HOME = {
    "generate": ("castalia.generate.engine", "generate"),
    "load": ("castalia.generate.load", "load_run"),
    "train": ("castalia.train.run", "train"),
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        module, attribute = _HOME[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'castalia' has no attribute {name!r}")
