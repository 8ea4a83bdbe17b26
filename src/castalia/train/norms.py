"""Weights and gradients, parameter by parameter -> L2 norms and shares of zeros (logging.norms).

For looking into a run that misbehaves. It is off unless asked for, and costs a pass over
what is asked for every logging.interval steps. Gradients are those of the whole batch,
before clipping; weights and moments are those after the update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from castalia.config import LoggingConfig
from castalia.optim import WeightStore
from castalia.optim.weights import l2_norm

Numbers = dict[str, dict[str, float]]


class Norms:
    """What logging.norms and logging.zero_gradients ask for, gathered around one update.

    Args:
        cfg: says which.
    """

    def __init__(self, cfg: LoggingConfig) -> None:
        self._which, self._zeros = cfg.norms, cfg.zero_gradients
        self._gradients: Numbers = {}

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return bool(self._which) or self._zeros

    def before_update(self, store: WeightStore) -> None:
        """Measure the gradients, which the update may use up."""
        gradients = store.gradients() if self._zeros or "gradient" in self._which else {}
        self._gradients = {}
        if "gradient" in self._which:
            self._gradients["gradient"] = _norms(gradients)
        if self._zeros:
            self._gradients["zero_gradients"] = {n: (g == 0).double().mean().item() for n, g in gradients.items()}

    def after_update(self, store: WeightStore) -> Numbers:
        """Everything, by kind and then by name; an optimizer's are called `<parameter>_<moment>`."""
        tensors = store.tensors()
        numbers = dict(self._gradients)
        if "parameter" in self._which:
            numbers["parameter"] = _norms(_below("model.", tensors))
        if "optimizer" in self._which:
            moments = {"_".join(n.rsplit(".", 1)): t for n, t in _below("optimizer.", tensors).items()}
            numbers["optimizer"] = _norms(moments)
        return numbers


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@torch.no_grad()
def _norms(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {name: l2_norm([tensor]).item() for name, tensor in tensors.items()}
