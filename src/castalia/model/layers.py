"""The parts of a block: linear maps, MLP, and what the layers of a forward pass share.

Precision follows the weights that a forward pass is given, not a global mode: a matrix
product runs in the dtype of its matrix (so bf16 working copies give bf16 products), while
norms, softmax statistics and the residual stream stay fp32. The same code therefore runs
under kept bf16 copies, under FSDP2's mixed precision, and in plain fp32.

Two settings of GPT-NeoX change nothing here: `apply_query_key_layer_scaling` divides scores by
the layer's number and multiplies them back in fp32, and `attention_softmax_in_fp32` asks for
what is always so.

Shape letters: B batch, S sequence, T keys, h hidden, n query heads, k key/value heads,
g = n / k, d head size, r rotated dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from castalia.config import ModelConfig
from castalia.model.attention_mask import Documents, MaskSpec
from castalia.model.dropout import DropoutKey
from castalia.model.registry import ACTIVATIONS, look_up

if TYPE_CHECKING:
    from castalia.model.collected import Collected


class Cache(Protocol):
    """Keys and values of earlier tokens, for generation."""

    length: int
    positions: Tensor | None
    """Position ids of what is stored, noted by models whose scores depend on distances."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `[B, k, S, d]` of the new tokens; return all of them, `[B, k, length + S, d]`."""
        ...

    def advance(self, count: int) -> None:
        """Count `count` tokens as stored; the caller of a forward pass does so for its tokens."""
        ...


class Context(NamedTuple):
    """What the layers of one forward pass share.

    Attributes:
        rotary: cos and sin as `rotate` wants them; None: positions enter otherwise.
        masks: for each executed layer what its attention sees; empty: all earlier tokens.
        documents: which tokens belong together; None: all of a row.
        cache: earlier keys and values; None: there are none.
        dropout: which masks; None: no dropout.
        collected: where layers note what a training step needs besides hidden states; None: no one does.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    masks: tuple[MaskSpec, ...] = ()
    documents: Documents | None = None
    cache: Cache | None = None
    dropout: DropoutKey | None = None
    collected: Collected | None = None

    def mask(self, layer: int) -> MaskSpec:
        """What the attention of the executed layer sees; a module after the last layer sees what that does."""
        if self.masks:
            return self.masks[min(layer, len(self.masks) - 1)]
        return MaskSpec(past=0 if self.cache is None else self.cache.length)


def native_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in W's dtype, as torch computes it."""
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


class Linear(nn.Linear):
    """y = x W^T + b in W's dtype.

    Attributes:
        product: computes it from x, W and b; others take the place of torch's own (castalia.model.kernels, float8).
    """

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(native_product)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` of any dtype to `[..., out]` of the weight's dtype."""
        return self.product(x, self.weight, self.bias)


class MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) for gated activations (Shazeer 2020)."""

    def __init__(self, cfg: ModelConfig, size: int | None = None, bias: bool | None = None) -> None:
        super().__init__()
        size, bias = size or cfg.mlp_size, cfg.mlp_bias if bias is None else bias
        self.activation = look_up(ACTIVATIONS, cfg.activation, "model.activation")
        self.gate = Linear(cfg.hidden_size, size, bias=bias) if cfg.gated else None
        self.up = Linear(cfg.hidden_size, size, bias=bias)
        self.down = Linear(size, cfg.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, h]` to `[B, S, h]`."""
        up = self.up(x)
        inner = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        return self.down(inner)
