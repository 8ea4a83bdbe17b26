"""The loss scale of fp16: large enough that small gradients do not vanish, small enough that large ones stay finite.

    loss x scale ─backward in fp16─> gradients x scale ─fp32─> / scale ─> norm, clipping, update
                                              └─ not finite: the step is left out, the scale shrinks

(Micikevicius et al. 2018.) The dynamic scale follows DeepSpeed's rule under ZeRO: an overflow takes one
from the hysteresis or, where that is 1, halves the scale; every `window` steps without one the scale
doubles and the hysteresis is full again. Whether a step overflowed is read off its gradient's
global norm, which all ranks know, so their scalers agree without speaking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from castalia.config import TrainingConfig


class LossScaler:
    """The scale of one run.

    Args:
        cfg: `loss_scale` for one that stays, or how a dynamic one begins and moves.

    Attributes:
        scale: what the next step's loss is multiplied by.
        left: overflows that the dynamic scale still bears, and the one that halves it.
        good: steps since the last overflow.
    """

    def __init__(self, cfg: TrainingConfig) -> None:
        self._cfg = cfg
        self.scale = cfg.loss_scale or 2.0**cfg.initial_scale_power
        self.left, self.good = cfg.loss_scale_hysteresis, 0

    @torch.no_grad()
    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide accumulated fp32 gradients by the scale, in place."""
        tensors = list(gradients)
        if tensors:
            torch._foreach_mul_(tensors, 1.0 / self.scale)

    def update(self, finite: bool) -> bool:
        """After a step: move the scale.

        Args:
            finite: loss and gradient were.

        Returns:
            False where the gradient overflowed though the dynamic scale is as small as it may be.
        """
        if self._cfg.loss_scale is not None:
            return True
        if finite:
            self.good += 1
            if self.good % self._cfg.loss_scale_window == 0:
                self.left, self.scale = self._cfg.loss_scale_hysteresis, 2 * self.scale
            return True
        self.good = 0
        if self.left > 1:
            self.left -= 1
            return True
        if self.scale <= self._cfg.min_loss_scale:
            return False
        self.scale = max(self.scale / 2, self._cfg.min_loss_scale)
        return True

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"scale": self.scale, "hysteresis": self.left, "good_steps": self.good}

    def restore(self, state: Mapping[str, float] | None) -> None:
        """Go on from a checkpoint's state; None (one of another precision has none): begin as configured.

        A scale that the configuration fixes stays as it says.
        """
        if state is not None and self._cfg.loss_scale is None:
            self.scale, self.left, self.good = state["scale"], int(state["hysteresis"]), int(state["good_steps"])
