"""Names in YAML -> parts of a model.

Built-in parts are the entries of these dictionaries; a user's own part is named in YAML as
`module:attribute` or `path/to/file.py:attribute`, or registered by `@register(BLOCKS, "name")` in
a program that then trains. A path is looked for from the current folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from castalia.errors import UserError

Factory = Callable[..., Any]

BLOCKS: dict[str, Factory] = {}
NORMS: dict[str, Factory] = {}
CORES: dict[str, Factory] = {}
LOSSES: dict[str, Factory] = {}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "softsign": F.softsign,
    # The gate's function of the gated ones (Shazeer 2020); the product is the MLP's business.
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
    "glu": torch.sigmoid,
    "bilinear": lambda x: x,
}


def register(registry: dict[str, Factory], name: str) -> Callable[[Factory], Factory]:
    """Decorator: make a part known by `name`; a name that is taken is an error."""

    def enter(part: Factory) -> Factory:
        if name in registry:
            raise ValueError(f"'{name}' is registered already, as {registry[name]!r}")
        registry[name] = part
        return part

    return enter


def look_up(registry: dict[str, Any], name: str, key: str) -> Any:
    """The part called `name`, or the attribute that `module:attribute` or `file.py:attribute` names.

    Args:
        registry: one of the dictionaries above.
        name: what the YAML says.
        key: the YAML key, for the message.

    Raises:
        UserError: there is no such part.
    """
    if name in registry:
        return registry[name]
    module, colon, attribute = name.rpartition(":")
    if colon:
        try:
            return getattr(_file(module) if module.endswith(".py") else import_module(module), attribute)
        except FileNotFoundError:
            raise UserError(f"{key}: there is no file '{module}' in {Path.cwd()}: give its path from there") from None
        except ImportError as error:
            raise UserError(f"{key}: '{name}' cannot be imported: {error}") from None
        except AttributeError:
            raise UserError(f"{key}: module '{module}' has no '{attribute}'") from None
    known = ", ".join([*sorted(registry), "module:attribute", "file.py:attribute"])
    raise UserError(f"{key}: '{name}' is not known; known: {known}")


def _file(path: str) -> ModuleType:
    """The module in a file, run once however often it is named."""
    found = Path(path).resolve()
    name = "castalia_user_" + "".join(c if c.isalnum() else "_" for c in str(found))
    if name not in sys.modules:
        spec = spec_from_file_location(name, found)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
