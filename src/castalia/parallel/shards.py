"""ZeRO through FSDP2: weights, gradients and optimizer state spread over data-parallel ranks.

    stage 1   weights gathered once a step; gradients summed and scattered once, after the last micro-batch
    stage 2   gradients scattered after each micro-batch: no rank keeps whole ones
    stage 3   weights gathered for each layer's forward and backward: no rank keeps whole ones

(Rajbhandari et al. 2020.) FSDP2's own averaging is off: the loss is already divided by the tokens of
the global batch. The optimizer sees plain local tensors and never a DTensor.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from castalia.config import Config, OptimizerConfig
from castalia.model.transformer import Transformer
from castalia.optim.offload import HOST, HostStore
from castalia.optim.weights import PlainStore, low_precision_names, working_dtype
from castalia.parallel.mesh import Mesh
from castalia.parallel.parallelize import local_part, moved
from castalia.parallel.plans import Place


def shard(model: Transformer, places: dict[str, Place], config: Config, mesh: Mesh) -> dict[str, Place]:
    """Wrap a model on the meta device in place; where each parameter's local rows then lie."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    ranks = mesh.device_mesh("shard", "context") if mesh.layout.replicate == 1 else _two_dimensional(mesh)
    # Weights of matrices are gathered in their working dtype, all others in fp32, as without ZeRO.
    working = working_dtype(config.training.precision)
    low = MixedPrecisionPolicy(working, torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    again = mesh.layout.zero == 3
    host = config.parallel.offload == "parameters"
    where = CPUOffloadPolicy(pin_memory=mesh.device.type != HOST.type) if host else OffloadPolicy()
    matrices = set(low_precision_names(model)) if working is not None else set()

    def wrap(module: nn.Module, prefix: str, gather_again: bool) -> None:
        inner = [
            m for n, m in module.named_modules() if any(f"{prefix}{n}.{leaf}" in matrices for leaf in m._parameters)
        ]
        if inner:
            fully_shard(inner, mesh=ranks, mp_policy=low, offload_policy=where, reshard_after_forward=gather_again)
        fully_shard(module, mesh=ranks, mp_policy=wide, offload_policy=where, reshard_after_forward=gather_again)

    for name, block in model.layers.named_children():
        wrap(block, f"layers.{name}.", again)
    head = model.embedding if model.cfg.tie_embeddings else model.head
    if head is not None and matrices:
        fully_shard(head, mesh=ranks, mp_policy=low, offload_policy=where, reshard_after_forward=False)
    fully_shard(model, mesh=ranks, mp_policy=wide, offload_policy=where, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    sharded = {}
    for name, parameter in model.named_parameters():
        p = cast(Any, parameter)
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        sharded[name] = moved(places[name], offset[0] if shape[0] else 0, shape[0], ranks.size(-1))
    return sharded


def _two_dimensional(mesh: Mesh) -> Any:
    """Replicas of groups of shards (HSDP)."""
    return mesh.replicas_of_shards()


class _Locals(nn.Module):
    """Local shards under canonical names, for a store that asks a module for its parameters."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.cfg = model.cfg
        self.parts = {
            n: nn.Parameter(local_part(p), requires_grad=p.requires_grad) for n, p in model.named_parameters()
        }

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        """Name and local shard."""
        return iter(self.parts.items())


class ShardedStore(PlainStore):
    """Masters are FSDP2's local shards; FSDP2 itself gives the forward pass its weights.

    Args:
        model: wrapped, in memory.
        zero: ZeRO's stage.
    """

    def __init__(self, model: Transformer, cfg: OptimizerConfig, zero: int) -> None:
        self._wrapped, self._zero = cast(Any, model), zero
        self._watched = False
        super().__init__(_Locals(model), cfg, None)

    def working(self) -> dict[str, Tensor]:
        """Empty: the module's own weights are the right ones, once those of the loss are gathered too."""
        head = self._wrapped.head
        if isinstance(head, FSDPModule):  # the loss reads its weight without calling it
            head.unshard()
        return {}

    def prepare(self, first: bool, last: bool) -> None:
        """See WeightStore: it decides when weights are gathered and gradients summed and scattered."""
        self._last = last
        watched = first and self._watched
        self._wrapped.set_requires_gradient_sync(self._zero > 1 or last or watched)
        self._wrapped.set_is_last_backward(last)
        if self._zero < 3:
            self._wrapped.set_reshard_after_backward(last or watched)

    def collect(self) -> None:
        """After the last micro-batch: take the gradients, which accumulate in FSDP2."""
        if not self._last:
            return
        for (_, wrapped), mine in zip(
            self._wrapped.named_parameters(), cast(_Locals, self._model).parts.values(), strict=True
        ):
            if wrapped.grad is not None:
                mine.grad = cast(Any, wrapped.grad).to_local()

    def watch_first(self) -> None:
        """See WeightStore: in each stage, the first micro-batch's gradients are summed and scattered at once."""
        self._watched = True

    def so_far(self) -> dict[str, Tensor]:
        """See WeightStore; FSDP2 has summed it over the data-parallel ranks already."""
        found = {n: cast(Any, p.grad) for n, p in self._wrapped.named_parameters() if p.grad is not None}
        return {n: grad.to_local() for n, grad in found.items()}

    def discard(self) -> None:
        """See WeightStore."""
        super().discard()
        self._wrapped.zero_grad(set_to_none=True)

    def step(self, lr: float, divisor: Tensor | None = None) -> None:
        """See WeightStore."""
        super().step(lr, divisor)
        self._wrapped.zero_grad(set_to_none=True)


class HostShardedStore(ShardedStore, HostStore):
    """Masters are copies of FSDP2's local shards on the host."""
