"""Optimizers that look at a whole matrix: Muon, SOAP, Adafactor, SM3.

    this rank's part of a gradient ──Whole.gather──> all of it ──direction()──> the update ──Whole.part──> its part

A parameter may lie in parts on several ranks. `Whole` is how an optimizer reaches the rest: by itself it is
the identity, and a parallel run passes one that asks the other ranks. So each layout computes the same update.
Every rank that holds a part computes the whole update; states that belong to the whole are held by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from castalia.optim.elementwise import Group, RecurrentOptimizer, State


class Whole(Protocol):
    """How to reach all of a parameter of which this rank may hold a part."""

    shape: tuple[int, ...]

    def gather(self, part: Tensor) -> Tensor:
        """This rank's part of something shaped as the parameter -> all of it. A collective."""
        ...

    def part(self, whole: Tensor) -> Tensor:
        """All of something shaped as the parameter -> this rank's part."""
        ...


class Alone:
    """See Whole, where one rank holds all."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def gather(self, part: Tensor) -> Tensor:
        """The same."""
        return part

    def part(self, whole: Tensor) -> Tensor:
        """The same."""
        return whole


class MatrixOptimizer(RecurrentOptimizer):
    """Decoupled decay and lr x `direction` of whole gradients; AdamW for groups that are not `matrix`.

    Attributes:
        everywhere: `direction` serves vectors and embeddings too.
    """

    everywhere = False

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, **{"betas": (0.9, 0.95), "eps": 1e-8, "matrix": True, **defaults})
        self._wholes: dict[Tensor, Whole] = {}

    def reach(self, wholes: Mapping[Tensor, Whole]) -> None:
        """Say how the parameters' other parts are reached, before the first update."""
        self._wholes = dict(wholes)

    def whole(self, parameter: Tensor) -> Whole:
        """How all of a parameter is reached."""
        return self._wholes.get(parameter) or Alone(tuple(parameter.shape))

    def seen(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        """What is gathered, this rank's part of it: the gradient."""
        return gradient

    def direction(self, whole: Tensor, state: State, group: Group) -> Tensor:
        """The update per unit of learning rate, shaped as the whole parameter."""
        raise NotImplementedError

    def smooth(self, part: Tensor, state: State, group: Group) -> Tensor:
        """This rank's part of the update -> what is applied: the same."""
        return part

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        """See RecurrentOptimizer."""
        if not (self.everywhere or group["matrix"]):
            adamw(parameter, gradient, state, group)
            return
        reach = self.whole(parameter)
        found = self.direction(reach.gather(self.seen(gradient, state, group)), state, group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(self.smooth(reach.part(found), state, group), alpha=-group["lr"])


def adamw(parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
    """Loshchilov & Hutter 2019, of one parameter in place."""
    (first, second), step = group["betas"], float(state["step"])
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(adam_direction(state["exp_avg"], state["exp_avg_sq"], step, group), alpha=-group["lr"])


def adam_direction(mean: Tensor, square: Tensor, step: float, group: Group) -> Tensor:
    """m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)."""
    first, second = group["betas"]
    root = (square / (1 - second**step)).sqrt_().add_(group["eps"])
    return (mean / (1 - first**step)).div_(root)


class Muon(MatrixOptimizer):
    """Jordan et al. 2024: momentum whose singular values are made one, by five Newton-Schulz steps.

    Scaled by 0.2 sqrt(larger side), which gives updates AdamW's size (Liu et al. 2025), so that one learning
    rate and one decay serve both. Matrices inside layers only; experts one by one.
    """

    def seen(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        """m <- mu m + g; with Nesterov, g + mu m."""
        momentum = state["exp_avg"].mul_(group["momentum"]).add_(gradient)
        return gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum

    def direction(self, whole: Tensor, state: State, group: Group) -> Tensor:
        """See MatrixOptimizer."""
        return orthogonal(whole) * (0.2 * max(whole.shape[-2:]) ** 0.5)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Singular values to about one, vectors kept: Newton-Schulz with Jordan's quintic, in the given dtype.

    Args:
        matrix: [..., rows, columns].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Soap(MatrixOptimizer):
    """Vyas et al. 2024: Adam in the eigenbasis of Shampoo's preconditioners (algorithms 3 and 4).

    Every `precondition_every` updates the basis is renewed by one power iteration and a QR decomposition. The
    first one is the identity, where the authors take the first gradient's eigenvectors: a matrix that is not
    square leaves some of those to rounding, and then no two layouts would train alike.
    """

    def begin(self, parameter: Tensor, state: State) -> None:
        """The first basis."""
        for side in ("left_basis", "right_basis"):
            if side in state:
                state[side].copy_(torch.eye(state[side].shape[-1]))

    def direction(self, whole: Tensor, state: State, group: Group) -> Tensor:
        """See MatrixOptimizer."""
        (first, second), step = group["betas"], float(state["step"])
        left, right = state["left_basis"], state["right_basis"]
        mean, square = state["whole_exp_avg"], state["rotated_exp_avg_sq"]
        mean.lerp_(whole, 1 - first)
        turned = left.mT @ whole @ right
        square.mul_(second).addcmul_(turned, turned, value=1 - second)
        found = left @ adam_direction(left.mT @ mean @ right, square, step, group) @ right.mT
        state["left"].lerp_(whole @ whole.mT, 1 - second)
        state["right"].lerp_(whole.mT @ whole, 1 - second)
        if step % group["precondition_every"] == 0:
            for side in ("left", "right"):
                state[f"{side}_basis"].copy_(torch.linalg.qr(state[side] @ state[f"{side}_basis"])[0])
        return found


class Adafactor(MatrixOptimizer):
    """Shazeer & Stern 2018, with an external learning rate: second moments as row and column means.

    Decay 1 - t^-0.8, updates clipped to a root mean square of 1, no momentum; vectors keep full moments.
    """

    everywhere = True

    def direction(self, whole: Tensor, state: State, group: Group) -> Tensor:
        """See MatrixOptimizer."""
        decay = 1 - float(state["step"]) ** -0.8
        square = whole.square().add_(1e-30)
        if whole.ndim > 1:
            rows = state["row"].lerp_(square.mean(-1), 1 - decay)
            columns = state["column"].lerp_(square.mean(-2), 1 - decay)
            scale = (rows / rows.mean(-1, keepdim=True)).unsqueeze(-1) * columns.unsqueeze(-2)
        else:
            scale = state["variance"].lerp_(square, 1 - decay)
        update = whole * scale.rsqrt()
        return update.div_(update.square().mean().sqrt().clamp_min(1.0))


class Sm3(MatrixOptimizer):
    """Anil et al. 2019: one accumulator for each index of each dimension.

    nu = min over dimensions of A; nu <- beta nu + (1 - beta) g^2, or nu + g^2 where beta is 0; A <- max of nu
    over the other dimensions; the update is g / sqrt(nu + eps), or its exponential mean with `momentum`.
    """

    everywhere = True

    def direction(self, whole: Tensor, state: State, group: Group) -> Tensor:
        """See MatrixOptimizer."""
        sides = [state[f"accumulator_{d}"] for d in range(max(whole.ndim, 1))]
        views = [a.view([-1 if d == e else 1 for e in range(max(whole.ndim, 1))]) for d, a in enumerate(sides)]
        least = views[0].expand(whole.shape)
        for view in views[1:]:
            least = torch.minimum(least, view)
        beta = group["beta"]
        nu = beta * least + (1 - beta) * whole.square() if beta else least + whole.square()
        for d, side in enumerate(sides):
            others = [e for e in range(nu.ndim) if e != d]
            most = nu.amax(others) if others else nu
            side.copy_(torch.maximum(side, most) if beta else most)
        return whole / (nu + group["eps"]).sqrt()

    def smooth(self, part: Tensor, state: State, group: Group) -> Tensor:
        """m <- mu m + (1 - mu) u, this rank's part; without momentum there is no m."""
        if not group["momentum"]:
            return part
        return state["exp_avg"].mul_(group["momentum"]).add_(part, alpha=1 - group["momentum"])


Shapes = Callable[[tuple[int, ...], bool], dict[str, tuple[int, ...]]]
"""Whole shape of a parameter, and whether it is one of the matrices -> states that belong to all of it."""


def soap_states(shape: tuple[int, ...], matrix: bool) -> dict[str, tuple[int, ...]]:
    """Of SOAP."""
    if not matrix:
        return {}
    left, right = (*shape[:-2], shape[-2], shape[-2]), (*shape[:-2], shape[-1], shape[-1])
    square = {"left": left, "left_basis": left, "right": right, "right_basis": right}
    return {**square, "whole_exp_avg": shape, "rotated_exp_avg_sq": shape}


def adafactor_states(shape: tuple[int, ...], matrix: bool) -> dict[str, tuple[int, ...]]:
    """Of Adafactor."""
    return {"row": shape[:-1], "column": (*shape[:-2], shape[-1])} if len(shape) > 1 else {"variance": shape}


def sm3_states(shape: tuple[int, ...], matrix: bool) -> dict[str, tuple[int, ...]]:
    """Of SM3."""
    return {f"accumulator_{d}": (n,) for d, n in enumerate(shape or (1,))}
