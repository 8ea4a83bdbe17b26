"""Names in YAML -> optimizers, and which parameters share a group.

An optimizer is a `torch.optim.Optimizer`, made from groups. `elementwise` says that it
treats every element alike, so that it may run over flat buffers instead of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castalia.config import ModelConfig, OptimizerConfig, mup
from castalia.config.mup import Family
from castalia.errors import UserError

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerKind:
    """How to make an optimizer, and what it keeps.

    Attributes:
        make: from parameter groups (each with `params` and `weight_decay`) and the configuration.
        moments: names of its state tensors, each shaped as its parameter.
        elementwise: the update of an element depends on nothing but that element's history.
        mup: which of muP's rules for learning rates fits; None: none is known.
    """

    make: Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]
    moments: tuple[str, ...]
    elementwise: bool = True
    mup: Family | None = None


def _adamw(groups: Groups, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), decoupled decay, torch's fused kernel."""
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, ("exp_avg", "exp_avg_sq"), mup="adam"),
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


class Rule(NamedTuple):
    """What parameters of one group share: their weight decay, and their learning rate over the configured one."""

    decay: float
    rate: float


def by_rule(
    parameters: Mapping[str, Tensor], cfg: OptimizerConfig, model: ModelConfig | None
) -> list[tuple[Rule, list[str]]]:
    """Names of the parameters of each rule, in the model's order; those that decay come first.

    Args:
        model: by whose width muP sets rates; None: not known, and then all are 1.

    Raises:
        UserError: muP is on, and has no rule for this optimizer.
    """
    family = optimizer_kind(cfg).mup
    if model is not None and model.mup and family is None:
        raise UserError(
            f"model.mup: no rule for learning rates with optimizer.type '{cfg.type}' is known: use adamw, or say "
            "mup='adam' or 'sgd' in its OptimizerKind"
        )
    groups: dict[tuple[bool, Rule], list[str]] = {}
    for name, parameter in parameters.items():
        rate = 1.0 if model is None or family is None else mup.rate_factor(name, model, family)
        decay = cfg.weight_decay * mup.decay_factor(rate) if decays(name, parameter) else 0.0
        groups.setdefault((decays(name, parameter), Rule(decay, rate)), []).append(name)
    return [(rule, groups[flag, rule]) for flag, rule in sorted(groups, key=lambda key: not key[0])]


def prepare_state(optimizer: torch.optim.Optimizer, kind: OptimizerKind, done: int = 0) -> None:
    """Give every parameter its state (moments zero, `done` steps), so that a checkpoint can be read into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(float(done), dtype=torch.float32, device=parameter.device)
            for moment in kind.moments:
                state.setdefault(moment, torch.zeros_like(parameter))
