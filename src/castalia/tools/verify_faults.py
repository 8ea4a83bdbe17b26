"""Bugs that parallel code is known for; `castalia verify layouts --plant` shows that they are found.

    FAULTS[name](parts) ──> the assembled model, store and engine of a rank, with the fault

Two are of the exchange between ranks, one of how weights are cut, two of one named layer, forward and
backward. A rank that does not have what is to be spoilt (another stage of a pipeline) is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _drop_reduction(parts: Any) -> None:
    parts.store.reduce = lambda: None


def _average_loss(parts: Any) -> None:
    parts.count = lambda tokens: tokens * parts.mesh.layout.data


def _shift_shard(parts: Any) -> None:
    name = "layers.1.mlp.up.weight"
    with torch.no_grad():
        tensor = parts.store.tensors().get(f"model.{name}")
        if tensor is None:  # on another stage of a pipeline
            return
        local = getattr(tensor, "local", tensor)
        local.copy_(local.roll(1, 0))
    parts.store.refresh()


def _wrong_output(parts: Any) -> None:
    module = dict(parts.model.named_modules()).get("layers.1.attention")
    if module is not None:
        module.register_forward_hook(lambda _, __, out: 1.01 * out)


def _wrong_gradient(parts: Any) -> None:
    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0].clone()
        if x.requires_grad:
            x.register_hook(lambda gradient: 1.01 * gradient)
        return (x, *inputs[1:])

    module = dict(parts.model.named_modules()).get("layers.1.mlp")
    if module is not None:
        module.register_forward_pre_hook(enter)


FAULTS: dict[str, Callable[[Any], None]] = {
    "dropped_all_reduce": _drop_reduction,
    "averaged_loss": _average_loss,
    "wrong_shard": _shift_shard,
    "wrong_output": _wrong_output,
    "wrong_gradient": _wrong_gradient,
}
