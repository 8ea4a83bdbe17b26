"""Weights and gradients, parameter by parameter -> L2 norms and shares of zeros (logging.norms).

For looking into a run that misbehaves. It is off unless asked for, and costs a pass over
what is asked for every logging.interval steps. Gradients are those of the whole batch,
before clipping; weights and moments are those after the update. With several processes, each
measures its parts, and one sum over all of them makes the numbers of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint.tensors import Piece
from castalia.config import LoggingConfig
from castalia.optim import WeightStore
from castalia.optim.weights import sum_of_squares
from castalia.parallel.store import SpreadStore

Numbers = dict[str, dict[str, float]]


class Norms:
    """What logging.norms and logging.zero_gradients ask for, gathered around one update.

    Args:
        cfg: says which.
    """

    def __init__(self, cfg: LoggingConfig) -> None:
        self._which, self._zeros = cfg.norms, cfg.zero_gradients
        self._gradients: dict[str, list[float]] = {}

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return bool(self._which) or self._zeros

    @torch.no_grad()
    def before_update(self, store: WeightStore) -> None:
        """Measure this process's gradients, which the update may use up: squares, zeros, numbers in all."""
        self._gradients = {}
        if self._zeros or "gradient" in self._which:
            for name, gradient in store.gradients().items():
                zeros = (gradient == 0).sum().item() if self._zeros else 0.0
                self._gradients[name] = [_square(gradient), zeros, gradient.numel()]

    @torch.no_grad()
    def after_update(self, store: WeightStore) -> Numbers:
        """Everything, by kind and then by name; an optimizer's are called `<parameter>_<moment>`.

        Every process calls it, and gets the same numbers.
        """
        amounts: dict[str, list[float]] = {}
        held: dict[str, Any] = store.tensors()
        for key, tensor in held.items():
            kind, _, name = key.partition(".")
            asked = {"model": "parameter"}.get(kind, kind) in self._which
            part = tensor.local if isinstance(tensor, Piece) else tensor
            gradient = self._gradients.get(name, [0.0] * 3) if kind == "model" else [0.0] * 3
            amounts[key] = [_square(part) if asked else 0.0, *gradient]
        totals = store.totals(amounts) if isinstance(store, SpreadStore) else amounts
        weights = {n.removeprefix("model."): t for n, t in totals.items() if n.startswith("model.")}
        trained = {name: total for name, total in weights.items() if total[3]}
        numbers: Numbers = {}
        if "gradient" in self._which:
            numbers["gradient"] = {name: total[1] ** 0.5 for name, total in trained.items()}
        if self._zeros:
            numbers["zero_gradients"] = {name: total[2] / total[3] for name, total in trained.items()}
        if "parameter" in self._which:
            numbers["parameter"] = {name: total[0] ** 0.5 for name, total in weights.items()}
        if "optimizer" in self._which:
            moments = {n.removeprefix("optimizer."): t for n, t in totals.items() if n.startswith("optimizer.")}
            numbers["optimizer"] = {"_".join(n.rsplit(".", 1)): total[0] ** 0.5 for n, total in moments.items()}
        return numbers


def _square(part: Tensor) -> float:
    return float(sum_of_squares(part).item())
