"""Masters and optimizer on the host: the device keeps the weights that it computes with, and their gradients.

    device   weights ──forward, backward──> gradients       weights
                                               │ copied        ^ copied
    host                                       └─> update of masters and moments

(Ren et al. 2021, ZeRO-Offload.) Of AdamW's 16 bytes a parameter that leaves 8 on the device: a weight and a
gradient, both fp32. The update is the same kernel's on another processor. Where the device is the CPU there is
nothing to move, and the stores are the usual ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from castalia.config import Config
from castalia.optim.optimizers import Rule
from castalia.optim.weights import PlainStore, WeightStore, make_store, working_dtype

HOST = torch.device("cpu")


def offloads(config: Config, device: torch.device) -> bool:
    """Whether optimizer and masters live on another device than the weights that the model computes with."""
    return config.parallel.offload == "optimizer" and device.type != HOST.type


def offload_text(config: Config, device: torch.device) -> str | None:
    """What offloading means in this run, in one line; None where none is asked for."""
    kind = config.parallel.offload
    if kind == "none":
        return None
    if device.type == HOST.type:
        return f"parallel.offload {kind}: the device is the CPU, whose memory holds everything anyway: nothing changes"
    what = "weights, gradients" if kind == "parameters" else "master weights"
    return f"parallel.offload {kind}: {what}, optimizer state and the update are on the host"


def store_of(model: nn.Module, config: Config, arena: bool) -> WeightStore:
    """The store of a model whose weights are whole, as the configuration asks for it.

    Args:
        arena: flat buffers, where nothing is offloaded and the optimizer allows them.
    """
    precision = config.training.precision
    if offloads(config, next(model.parameters()).device):
        return HostStore(model, config.optimizer, working_dtype(precision))
    return make_store(model, config.optimizer, precision, arena)


class HostStore(PlainStore):
    """See WeightStore; the optimizer's parameters are copies on the host, the model's follow them."""

    def _make_optimizer(self, groups: list[tuple[Rule, list[nn.Parameter]]]) -> None:
        self._hosted = {n: nn.Parameter(p.detach().to(HOST, copy=True)) for n, p in self._parameters.items()}
        host_of = {p: self._hosted[n] for n, p in self._parameters.items()}
        super()._make_optimizer([(rule, [host_of[p] for p in parameters]) for rule, parameters in groups])

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """See WeightStore."""
        return self._hosted

    def step(self, lr: float, divisor: Tensor | None = None) -> None:
        """See WeightStore."""
        for n, p in self._parameters.items():
            self._hosted[n].grad = None if p.grad is None else p.grad.to(HOST)
        gradients = [p.grad for p in self._hosted.values() if p.grad is not None]
        self._update(lr, divisor, gradients)
        self.discard()
        self._follow()

    def discard(self) -> None:
        """See WeightStore."""
        super().discard()
        for p in self._parameters.values():
            p.grad = None

    def refresh(self) -> None:
        """See WeightStore."""
        self._follow()
        super().refresh()

    @torch.no_grad()
    def _follow(self) -> None:
        """The model's weights are the masters'."""
        for n, p in self._parameters.items():
            p.copy_(self._hosted[n])
