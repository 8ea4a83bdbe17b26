"""Layers whose inner activations are forgotten after the forward pass and computed again in backward.

    none        everything is kept
    full        of a layer its input alone is kept
    selective   also what matrix products and attention made, which is dear to compute; the rest is cheap

Dropout is counted and not drawn, so a second pass needs no generator's state. The weights of the first
pass go along: a forward pass may be given others than the module's own, and by the time of the
backward pass these are back in place. (Chen et al. 2016; Korthikanti et al. 2022)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from castalia.model.layers import Context

_DEAR = ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu")
_DEAR_MORE = ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_grouped_mm")

LayerRunner = Callable[[nn.Module, Tensor, int, Context], Tensor]


def run_layer(block: nn.Module, x: Tensor, layer: int, context: Context) -> Tensor:
    """Just call it: the default of `Transformer.runner`."""
    out: Tensor = block(x, layer, context)
    return out


class Recompute:
    """Calls layers so that some compute their activations again.

    Args:
        selective: keep the results of matrix products and attention.
        every: layers 0, every, 2 every, ... are recomputed.
        own_weights: modules are called with weights of their own, not by `functional_call`.
        offload: the inputs that are kept wait in the host's memory.
    """

    def __init__(
        self, selective: bool = False, every: int = 1, own_weights: bool = False, offload: bool = False
    ) -> None:
        self._every, self._own_weights, self._offload = every, own_weights, offload
        self._more: dict[str, Any] = {}
        if selective:
            dear = {getattr(torch.ops.aten, n).default for n in (*_DEAR, *_DEAR_MORE) if hasattr(torch.ops.aten, n)}
            self._more["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_keep, dear))

    def __call__(self, block: nn.Module, x: Tensor, layer: int, context: Context) -> Tensor:
        """See run_layer."""
        if layer % self._every or not torch.is_grad_enabled():
            return run_layer(block, x, layer, context)
        weights: dict[str, Tensor] | None = None if self._own_weights else dict(block.named_parameters())

        def run(x: Tensor) -> Tensor:
            if weights is None:
                return run_layer(block, x, layer, context)
            out: Tensor = functional_call(block, weights, (x, layer, context))
            return out

        with save_on_cpu() if self._offload else nullcontext():
            out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, **self._more)
        return out


def _keep(dear: set[Any], _: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in dear else CheckpointPolicy.PREFER_RECOMPUTE
