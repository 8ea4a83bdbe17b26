"""Optimizers that treat every element alike: Lion, MADGRAD, schedule-free AdamW.

    gradient, state of one element ──recurrence of the paper──> the element, its state

They run over flat buffers, over shards and over whole parameters without a difference, so none of
them asks other ranks for anything. Adam, AdamW and SGD are torch's own fused ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Group = dict[str, Any]


class RecurrentOptimizer(torch.optim.Optimizer):
    """A loop over parameters around `update`; state is made by `prepare_state`, which checkpoints read into.

    Args:
        groups: parameter groups with `params` and `weight_decay`.
        defaults: further options of every group.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, {"lr": 0.0, **defaults})

    def begin(self, parameter: Tensor, state: State) -> None:
        """What the state takes from the weights before the first update; nothing."""

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        """Change a parameter and its state in place; `state["step"]`, on the CPU, counts this update already."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if float(state["step"]) == 0:
                    self.begin(parameter, state)
                state["step"] += 1
                self.update(parameter, parameter.grad, state, group)


class Lion(RecurrentOptimizer):
    """Chen et al. 2023, "Symbolic discovery of optimization algorithms": the sign of a momentum."""

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        """p <- (1 - lr wd) p - lr sign(b1 m + (1 - b1) g); m <- b2 m + (1 - b2) g."""
        (first, second), momentum = group["betas"], state["exp_avg"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(torch.lerp(gradient, momentum, first).sign_(), alpha=-group["lr"])
        momentum.lerp_(gradient, 1 - second)


class Madgrad(RecurrentOptimizer):
    """Defazio & Jelassi 2021: dual averaging with the cube root of summed squares, and momentum by averaging.

    Args:
        anchored: only the weights decay, not the point from which the sums count, so that the next update
            undoes most of it: GPT-NeoX's `madgrad_wd`. Otherwise both decay.
    """

    def __init__(self, groups: list[dict[str, Any]], anchored: bool, **defaults: Any) -> None:
        super().__init__(groups, **defaults)
        self._anchored = anchored

    def begin(self, parameter: Tensor, state: State) -> None:
        """The sums count from where the weights begin."""
        state["origin"].copy_(parameter)

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        """With l = (lr + eps) sqrt(k): G += l g^2, S += l g, z = x0 - S / (G^(1/3) + eps), p <- mu p + (1 - mu) z."""
        rate = group["lr"] + group["eps"]
        keep = 1 - rate * group["weight_decay"]
        parameter.mul_(keep)
        if not self._anchored:
            state["origin"].mul_(keep)
        weight = rate * float(state["step"]) ** 0.5
        state["grad_sum_sq"].addcmul_(gradient, gradient, value=weight)
        state["grad_sum"].add_(gradient, alpha=weight)
        root = state["grad_sum_sq"].pow(1 / 3).add_(group["eps"])
        parameter.lerp_(torch.addcdiv(state["origin"], state["grad_sum"], root, value=-1.0), 1 - group["momentum"])


class ScheduleFree(RecurrentOptimizer):
    """Defazio et al. 2024, "The road less scheduled", AdamW's form: averaging in place of a decaying rate.

    The weights trained are y; `average` holds x, which is the model to use, and `z` the fast iterate.
    """

    def begin(self, parameter: Tensor, state: State) -> None:
        """All three points begin together."""
        state["z"].copy_(parameter)
        state["average"].copy_(parameter)

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        """z <- z - l g / (sqrt(v) + eps) - l wd y; x <- (1 - c) x + c z with c = l^2 / sum of l^2; y between them."""
        first, second = group["betas"]
        rate = group["lr"] * (1 - second ** float(state["step"])) ** 0.5
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        z, x = state["z"], state["average"]
        towards = gradient / state["exp_avg_sq"].sqrt().add_(group["eps"])
        towards.add_(parameter, alpha=group["weight_decay"])
        z.sub_(towards, alpha=rate)
        state["weight_sum"].add_(rate**2)
        share = (rate**2 / state["weight_sum"]).nan_to_num_()  # 0 / 0 while the rate is 0
        x.lerp_(z, share)
        parameter.copy_(torch.lerp(z, x, first))
