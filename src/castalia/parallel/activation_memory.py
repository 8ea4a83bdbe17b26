"""One layer, run twice without memory -> the bytes that it keeps and moves for a micro-batch of any size.

    layer on the meta device ─cut as for tensor parallelism─> forward, backward under a watch ─> Piece
    watch: every operation's outputs ─> storages alive (each once), the most at a time, products, bytes moved

What autograd saves is found rather than listed: a storage counts while anything holds it. Views, weights and what
layers share count nothing. A part of all this is fixed (gradients of weights), a part grows with the tokens: runs
with one sequence and with two tell them apart, and serve every micro-batch and context-parallel share. Attention is
taken for a fused kernel, unless its probabilities are dropped; experts for evenly used.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from castalia.config import Config
from castalia.model.attention import attend
from castalia.model.attention_mask import Drop, MaskSpec
from castalia.model.dropout import DropoutKey
from castalia.model.recompute import Recompute, run_layer
from castalia.model.transformer import Transformer
from castalia.optim.weights import low_precision_names, working_dtype
from castalia.parallel.plans import tensor_places
from castalia.parallel.tensor import RowLinear, _spread_block

SEQUENCE = 1
_PRODUCTS = ("mm", "addmm", "bmm", "grouped_linear", "grouped_linear_backward")
_FREE = ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "detach")


@dataclass
class Work:
    """What a pass has to do for the tokens of one piece.

    Attributes:
        products: of each matrix product: FLOPs, bytes of the weights, bytes of everything else.
        attention: FLOPs of attention, half of the square where it is causal.
        moved: bytes that all other operations read and write.
        operations: how many there are.
    """

    products: list[tuple[float, float, float]] = field(default_factory=list)
    attention: float = 0.0
    moved: float = 0.0
    operations: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.moved + other.moved,
            self.operations + other.operations,
        )

    @property
    def flops(self) -> float:
        """Of the matrix products."""
        return sum(product[0] for product in self.products)


@dataclass(frozen=True)
class Piece:
    """A part of the model at some sequences in a micro-batch.

    Attributes:
        saved: bytes that it adds to what is alive between its forward and its backward pass, its output included.
        forward_peak: the most that is alive in its forward pass, above what was before.
        backward_peak: the same in its backward pass, above what was before that; gradients of weights count while
            they are made.
        forward, backward: what they do.
    """

    saved: float
    forward_peak: float
    backward_peak: float
    forward: Work
    backward: Work


@dataclass(frozen=True)
class Pair:
    """A piece at one sequence and at two, so at any number: what it needs is a fixed part and one for each."""

    one: Piece
    two: Piece

    def at(self, sequences: float) -> Piece:
        """The piece at so many sequences, or at a share of one."""
        more, a, b = sequences - 1, self.one, self.two

        def line(first: float, second: float) -> float:
            return max(first + more * (second - first), 0.0)

        def work(first: Work, second: Work) -> Work:
            pairs = zip(first.products, second.products, strict=True)
            products = [(line(f, g), u, line(v, w)) for (f, u, v), (g, _, w) in pairs]
            attention, moved = line(first.attention, second.attention), line(first.moved, second.moved)
            return Work(products, attention, moved, first.operations)

        return Piece(
            line(a.saved, b.saved),
            line(a.forward_peak, b.forward_peak),
            line(a.backward_peak, b.backward_peak),
            work(a.forward, b.forward),
            work(a.backward, b.backward),
        )


class Watch(TorchDispatchMode):
    """Follows the storages that operations make, and adds up what the operations do.

    Args:
        outside: tensors that count nothing: weights, inputs, what layers share.
    """

    def __init__(self, outside: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.work = Work()
        self._outside = [t.untyped_storage() for t in outside]  # kept, so that no other takes their identity
        self._ignored = {id(storage) for storage in self._outside}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results, given = _tensors(out), _tensors((args, kwargs or {}))
        for tensor in results:
            if tensor.layout is torch.strided:  # a sparse gradient is a moment's
                self._see(tensor)
        self._count(func, given, results)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive or key in self._ignored:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _count(self, func: Any, given: list[Tensor], results: list[Tensor]) -> None:
        name = func.__name__.split(".")[0].lstrip("_") if "castalia" in str(func) else func.__name__.split(".")[0]
        if func.is_view or name in _FREE:
            return
        self.work.operations += 1
        if "attention" in name:
            q, k = given[1:3] if "backward" in name else given[:2]
            square = prod(q.shape) * k.shape[2]
            # Two products of S x T x d of which causality leaves half; backward makes five of them.
            self.work.attention += square * (5 if "backward" in name else 2)
        elif name in _PRODUCTS:
            matrices = [t for t in given if t.ndim >= 2]
            weights = sum(_bytes(t) for t in matrices if id(t.untyped_storage()) in self._ignored)
            rest = sum(_bytes(t) for t in (*given, *results)) - weights
            self.work.products.append((_flops(name, matrices), float(weights), float(rest)))
        else:
            self.work.moved += sum(_bytes(t) for t in (*given, *results))


def _flops(name: str, matrices: list[Tensor]) -> float:
    if name.startswith("grouped"):
        rows, weight = matrices[-2], matrices[-1]
        return 2.0 * rows.shape[0] * prod(weight.shape[1:]) * (2 if "backward" in name else 1)
    left, right = matrices[-2:]
    return 2.0 * prod(left.shape) * right.shape[-1]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Pieces:
    """Runs the kinds of layers of a model, each variant once.

    Args:
        config: complete; its sequence length and precision.
        accelerator: attention is an accelerator's kernel, which takes grouped keys as they are; else a CPU's.
    """

    def __init__(self, config: Config, accelerator: bool) -> None:
        self._config, self._accelerator = config, accelerator
        with torch.device("meta"):
            self._model = Transformer(config.model.model_copy(update={"mtp_depth": 0}))
        self._low = set(low_precision_names(self._model))
        self._known: dict[Any, Pair] = {}

    def layer(self, layer: int, recompute: str, tensor: int, sequence: bool) -> Pair:
        """One of the model's layers, whose parameters are those of `layer`.

        Args:
            recompute: as `performance.recompute`.
            tensor, sequence: it is cut so.
        """
        key = (layer, recompute, tensor, sequence)
        if key not in self._known:
            self._known[key] = Pair(self._run(*key, sequences=1), self._run(*key, sequences=2))
        return self._known[key]

    def _run(self, layer: int, recompute: str, tensor: int, sequence: bool, sequences: int) -> Piece:
        config, length = self._config, self._config.data.seq_length
        runner: Any = run_layer if recompute == "none" else Recompute(recompute == "selective", own_weights=True)
        with torch.device("meta"):
            block = copy.deepcopy(self._model.layers[layer])
            self._cut(block, layer, tensor, sequence)
            _lower(block, f"layers.{layer}.", self._low, config.training.precision)
            key = self._dropout(sequences)
            context = self._model._context(torch.arange(length), 0, None, key)
            if sequence and key is not None:
                context = context._replace(dropout=key.share(0, length // tensor))
            if hasattr(block, "attention"):
                cast(Any, block).attention.core = self._core
            held = length // (tensor if sequence else 1)
            x = torch.empty(sequences, held, config.model.hidden_size, requires_grad=True)
            outside = [x, *block.parameters(), *_tensors(context)]
            if context.dropout is not None:
                outside.append(context.dropout.streams)
            for parameter in block.parameters():
                parameter.register_post_accumulate_grad_hook(_forget)
            return _watched(lambda: runner(block, x, layer, context), outside)

    def _dropout(self, sequences: int) -> DropoutKey | None:
        model = self._config.model
        drops = model.hidden_dropout > 0 or model.attention_dropout > 0
        return DropoutKey(0, 0, torch.zeros(sequences, dtype=torch.int64)) if drops else None

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, drop: Drop | None = None, scale: float | None = None
    ) -> Tensor:
        """Attention by a fused kernel: it saves queries, keys, values, its result and a number for each query."""
        if drop is not None:
            return attend(q, k, v, mask, drop, scale)
        aten: Any = torch.ops.aten
        if self._accelerator:
            return cast(Tensor, aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[0])
        if q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return cast(Tensor, aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)[0])

    def _cut(self, block: nn.Module, layer: int, ranks: int, sequence: bool) -> None:
        """Leave a block the first rank's share, and in place of exchanges something of the same sizes."""
        if ranks == 1:
            return
        prefix = f"layers.{layer}."
        shapes = {f"{prefix}{n}": tuple(p.shape) for n, p in block.named_parameters()}
        for name, place in tensor_places(shapes, ranks, 0, sequence, 1).items():
            owner, _, leaf = name.removeprefix(prefix).rpartition(".")
            block.get_submodule(owner).register_parameter(leaf, nn.Parameter(torch.empty(place.local)))
        _spread_block(block, None, ranks, 0, False)
        if not sequence:
            return

        def gathered(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (torch.cat([inputs[0]] * ranks, SEQUENCE), *inputs[1:])

        def scattered(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            return y[:, : y.shape[SEQUENCE] // ranks].clone()

        parts = cast(Any, block)
        for part in (parts.attention, parts.mlp):
            part.register_forward_pre_hook(gathered)
        for out in (parts.attention.out, getattr(parts.mlp, "down", parts.mlp)):
            assert isinstance(out, RowLinear) or out is parts.mlp
            out.register_forward_hook(scattered)


def _lower(block: nn.Module, prefix: str, low: set[str], precision: str) -> None:
    """Give matrices the dtype in which products read them."""
    dtype = working_dtype(precision)
    for name, parameter in block.named_parameters():
        if dtype is not None and f"{prefix}{name}" in low:
            parameter.data = parameter.data.to(dtype)


def _forget(parameter: Tensor) -> None:
    """Gradients of weights are counted by whoever keeps them."""
    parameter.grad = None


def _watched(run: Callable[[], Tensor], outside: list[Tensor]) -> Piece:
    with Watch(outside) as watch:
        y = run()
        saved, forward_peak, forward = watch.now, watch.peak, watch.work
        watch.peak, watch.work = watch.now, Work()
        y.backward(torch.empty_like(y))
        return Piece(saved, forward_peak, watch.peak - saved, forward, watch.work)
