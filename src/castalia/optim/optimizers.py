"""Names in YAML -> optimizers, and which parameters share a group.

An optimizer is a `torch.optim.Optimizer`, made from groups. `elementwise` says that it
treats every element alike, so that it may run over flat buffers instead of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castalia.config import ModelConfig, OptimizerConfig, mup
from castalia.config.mup import Family
from castalia.errors import UserError
from castalia.optim import matrix
from castalia.optim.eight_bit import AdamW8bit
from castalia.optim.elementwise import Lion, Madgrad, RecurrentOptimizer, ScheduleFree
from castalia.optim.one_bit import OneBitAdam

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerKind:
    """How to make an optimizer, and what it keeps.

    Attributes:
        make: from parameter groups (each with `params` and `weight_decay`) and the configuration.
        moments: names of its state tensors, each shaped as its parameter.
        elementwise: the update of an element depends on nothing but that element's history.
        mup: which of muP's rules for learning rates fits; None: none is known.
        matrices: which parameters (name, tensor) are treated as matrices; their groups say `matrix`.
        others: names of the state tensors of those that are not; None: the same.
        whole: states that belong to a whole parameter, whatever part of it a rank holds.
    """

    make: Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]
    moments: tuple[str, ...]
    elementwise: bool = True
    mup: Family | None = None
    matrices: Callable[[str, Tensor], bool] = lambda name, parameter: True
    others: tuple[str, ...] | None = None
    whole: matrix.Shapes = lambda shape, is_matrix: {}

    def moments_of(self, is_matrix: bool) -> tuple[str, ...]:
        """Names of the states that are shaped as their parameter."""
        return self.moments if is_matrix or self.others is None else self.others


def _adamw(groups: Groups, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), decoupled decay, torch's fused kernel."""
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True)


def _adam(groups: Groups, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015), weight decay added to the gradient, torch's fused kernel."""
    return torch.optim.Adam(groups, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True)


def _sgd(groups: Groups, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """Gradient descent, weight decay added to the gradient, torch's fused kernel."""
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=True)


def _recurrent(kind: Callable[..., RecurrentOptimizer], **fixed: Any) -> Callable[[Groups, OptimizerConfig], Any]:
    def make(groups: Groups, cfg: OptimizerConfig) -> torch.optim.Optimizer:
        names = ("betas", "eps", "momentum", "nesterov", "precondition_every", "freeze_step")
        return kind(groups, **{n: getattr(cfg, n) for n in names}, beta=cfg.betas[1], **fixed)

    return make


def _inner(name: str, parameter: Tensor) -> bool:
    """The matrices inside layers: neither embeddings nor the head."""
    return name.startswith("layers.") and parameter.ndim > 1


def _not_embedding(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and "embedding" not in name


_ADAM = ("exp_avg", "exp_avg_sq")
_MADGRAD = ("grad_sum", "grad_sum_sq", "origin")

OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, _ADAM, mup="adam"),
    "adam": OptimizerKind(_adam, _ADAM, mup="adam"),
    "sgd": OptimizerKind(_sgd, ("momentum_buffer",), mup="sgd"),
    "lion": OptimizerKind(_recurrent(Lion), ("exp_avg",), mup="adam"),
    "madgrad": OptimizerKind(_recurrent(Madgrad, anchored=False), _MADGRAD),
    "madgrad_wd": OptimizerKind(_recurrent(Madgrad, anchored=True), _MADGRAD),
    "schedule_free": OptimizerKind(
        _recurrent(ScheduleFree),
        ("z", "average", "exp_avg_sq"),
        elementwise=False,
        whole=lambda shape, is_matrix: {"weight_sum": (1,)},
    ),
    "onebit_adam": OptimizerKind(
        _recurrent(OneBitAdam),
        _ADAM,
        elementwise=False,
        mup="adam",
        matrices=lambda name, parameter: parameter.ndim > 1,
    ),
    "adamw_8bit": OptimizerKind(_recurrent(AdamW8bit), _ADAM, elementwise=False, mup="adam", matrices=_not_embedding),
    "muon": OptimizerKind(_recurrent(matrix.Muon), ("exp_avg",), elementwise=False, matrices=_inner, others=_ADAM),
    "soap": OptimizerKind(
        _recurrent(matrix.Soap), (), elementwise=False, matrices=_inner, others=_ADAM, whole=matrix.soap_states
    ),
    "adafactor": OptimizerKind(_recurrent(matrix.Adafactor), (), elementwise=False, whole=matrix.adafactor_states),
    "sm3": OptimizerKind(_recurrent(matrix.Sm3), ("exp_avg",), elementwise=False, whole=matrix.sm3_states),
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
    kind = OPTIMIZERS[cfg.type]
    return replace(kind, moments=()) if cfg.type in ("sgd", "sm3") and not cfg.momentum else kind


def decays(name: str, parameter: Tensor) -> bool:
    """GPT-NeoX's rule: everything decays but biases and the gains of norms (all vectors)."""
    return parameter.ndim > 1


class Rule(NamedTuple):
    """What parameters of one group share: their weight decay, and their learning rate over the configured one.

    `matrix`: the optimizer treats them as matrices.
    """

    decay: float
    rate: float
    matrix: bool = True


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
    kind = optimizer_kind(cfg)
    groups: dict[tuple[bool, Rule], list[str]] = {}
    for name, parameter in parameters.items():
        rate = 1.0 if model is None or family is None else mup.rate_factor(name, model, family)
        decay = cfg.weight_decay * mup.decay_factor(rate) if decays(name, parameter) else 0.0
        own = [group for group in cfg.groups if re.search(group.match, name)][-1:]  # the last that matches counts
        for group in own:
            rate *= group.lr
            decay = decay if group.weight_decay is None else group.weight_decay
        rule = Rule(decay, rate, kind.matrices(name, parameter))
        groups.setdefault((decays(name, parameter), rule), []).append(name)
    return [(rule, groups[flag, rule]) for flag, rule in sorted(groups, key=lambda key: not key[0])]


def prepare_state(optimizer: torch.optim.Optimizer, kind: OptimizerKind, average: bool = False) -> None:
    """Give every parameter its state (moments zero, no step done), so that a checkpoint can be read into it."""
    recurrent = isinstance(optimizer, RecurrentOptimizer)
    for group in optimizer.param_groups:
        is_matrix = group.get("matrix", True)
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            # Ours read the number of steps, on a CPU without waiting; torch's fused kernels want it beside the weights.
            state["step"] = torch.zeros((), device="cpu" if recurrent else parameter.device)
            for moment in (*kind.moments_of(is_matrix), *(("average",) if average else ())):
                state.setdefault(moment, torch.zeros_like(parameter))
            shape = tuple(parameter.shape)
            if isinstance(optimizer, matrix.MatrixOptimizer):
                shape = optimizer.whole(parameter).shape
            for name, size in kind.whole(shape, is_matrix).items():
                state[name] = torch.zeros(size, dtype=parameter.dtype, device=parameter.device)
