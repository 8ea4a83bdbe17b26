"""Names in YAML -> optimizers, and which parameters share a group.

An optimizer is a `torch.optim.Optimizer`, made from groups. `elementwise` says that it
treats every element alike, so that it may run over flat buffers instead of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from castalia.config import OptimizerConfig
from castalia.errors import UserError

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerKind:
    """How to make an optimizer, and what it keeps.

    Attributes:
        make: from parameter groups (each with `params` and `weight_decay`) and the configuration.
        moments: names of its state tensors, each shaped as its parameter.
        elementwise: the update of an element depends on nothing but that element's history.
    """

    make: Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]
    moments: tuple[str, ...]
    elementwise: bool = True


def _adamw(groups: Groups, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), decoupled decay, torch's fused kernel."""
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, ("exp_avg", "exp_avg_sq")),
}


def optimizer_kind(cfg: OptimizerConfig) -> OptimizerKind:
    """The registered kind; raises UserError for an unknown name."""
    module, colon, attribute = cfg.type.partition(":")
    if colon:
        try:
            kind = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"optimizer.type: '{cfg.type}' cannot be imported: {error}") from None
        if not isinstance(kind, OptimizerKind):
            raise UserError(f"optimizer.type: '{cfg.type}' is no castalia.optim.OptimizerKind: wrap it in one")
        return kind
    if cfg.type not in OPTIMIZERS:
        raise UserError(f"optimizer.type: '{cfg.type}' is not known; known: {', '.join(sorted(OPTIMIZERS))}")
    return OPTIMIZERS[cfg.type]


def decays(name: str, parameter: Tensor) -> bool:
    """GPT-NeoX's rule: everything decays but biases and the gains of norms (all vectors)."""
    return parameter.ndim > 1


def by_decay(parameters: Mapping[str, Tensor]) -> list[tuple[bool, list[str]]]:
    """Names of the parameters that decay, and of those that do not, in the model's order; no empty group."""
    groups = [(flag, [n for n, p in parameters.items() if decays(n, p) is flag]) for flag in (True, False)]
    return [(flag, names) for flag, names in groups if names]


def prepare_state(optimizer: torch.optim.Optimizer, kind: OptimizerKind, done: int = 0) -> None:
    """Give every parameter its state (moments zero, `done` steps), so that a checkpoint can be read into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(float(done), dtype=torch.float32, device=parameter.device)
            for moment in kind.moments:
                state.setdefault(moment, torch.zeros_like(parameter))
