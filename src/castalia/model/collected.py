"""What a training forward pass hands out besides its hidden states, and the losses made of it.

    layers with experts ──> Routing by executed layer ──┐
    modules that look further ahead ──> hidden states ──┴─> Collected ──> the engine

The model does not know the losses' coefficients: it notes what happened, the engine weighs it.
A dictionary by layer, so that a layer that is recomputed in backward notes the same thing twice.
Collected is a plain class, since FSDP2 hands wrapped layers a copy of each dataclass that holds
differentiable tensors, and what is noted in a copy is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """How one layer shared out its tokens over E experts.

    Attributes:
        logits: fp32 `[B, S, E]`, of the router.
        scores: fp32 `[B, S, E]`, what the logits became; each at least 0.
        chosen: int64 `[B, S, k]`, the experts of each token.
    """

    logits: Tensor
    scores: Tensor
    chosen: Tensor


class Collected:
    """Filled by a forward pass that is given one.

    Attributes:
        routing: by executed layer; modules that look ahead count on from the last layer.
        ahead: fp32 `[B, S, h]` of each such module: place i of the d-th predicts label i + d.
    """

    def __init__(self) -> None:
        self.routing: dict[int, Routing] = {}
        self.ahead: list[Tensor] = []


def expert_counts(routing: Routing) -> Tensor:
    """Tokens that each expert of a layer was given, int64 `[E]`."""
    return _counts(routing.chosen.flatten(), routing.logits.shape[-1])


def balance_loss(routing: Routing, scope: str, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """E sum_i f_i P_i: 1 where experts are used evenly, E where one has all (Fedus et al. 2021, eq. 4-6).

    f_i is the share of assignments that went to expert i (no gradient), P_i the mean of its share of a
    token's scores, both over the tokens of the scope.

    Args:
        scope: `sequence`: of each row, averaged over rows; `micro_batch`: all rows together.
        total: sums a tensor over the ranks that hold other tokens of the same rows; what comes out is then to be
            averaged over these ranks. None: whole rows are here.

    Returns:
        A fp32 scalar.
    """
    experts = routing.logits.shape[-1]
    scores = routing.scores / routing.scores.sum(-1, keepdim=True)
    chosen = routing.chosen.flatten(1)
    if scope == "micro_batch":
        scores, chosen = scores.flatten(0, 1).unsqueeze(0), chosen.flatten().unsqueeze(0)
    used = torch.zeros(len(chosen), experts, dtype=scores.dtype, device=scores.device)
    used.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
    if total is not None:
        used = total(used)
    return experts * (used / used.sum(1, keepdim=True) * scores.mean(1)).sum(1).mean()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of log(sum exp logits)^2 (Zoph et al. 2022, eq. 5), a fp32 scalar."""
    return routing.logits.logsumexp(-1).square().mean()


def _counts(chosen: Tensor, experts: int) -> Tensor:
    # Not bincount, whose result has a size that a compiler cannot know.
    zeros = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    return zeros.scatter_add_(0, chosen, torch.ones_like(chosen))
