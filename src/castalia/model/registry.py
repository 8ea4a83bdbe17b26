"""Names in YAML -> parts of a model.

Built-in parts are the entries of three dictionaries; a user's own part is registered by
`@register(BLOCKS, "name")` in a file of theirs, or named in YAML as `module:attribute`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from castalia.errors import UserError

Factory = Callable[..., Any]

BLOCKS: dict[str, Factory] = {}
NORMS: dict[str, Factory] = {}
CORES: dict[str, Factory] = {}
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
    """The part called `name`, or the attribute that `module:attribute` names.

    Args:
        registry: one of the dictionaries above.
        name: what the YAML says.
        key: the YAML key, for the message.

    Raises:
        UserError: there is no such part.
    """
    if name in registry:
        return registry[name]
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            return getattr(import_module(module), attribute)
        except ImportError as error:
            raise UserError(f"{key}: '{name}' cannot be imported: {error}") from None
        except AttributeError:
            raise UserError(f"{key}: module '{module}' has no '{attribute}'") from None
    raise UserError(f"{key}: '{name}' is not known; known: {', '.join(sorted(registry))}, or module:attribute")
