"""Where numbers stop being numbers: the first operation that makes NaN or infinity out of finite inputs.

    model, loss, backward ──every operation, as it happens──> finite in, not finite out? ──> module, operation,
                                                                                            phase, sample, token
Minus infinity alone is no finding: masks are full of it. Slow, since every result is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from castalia.data.loader import Batch

_MAKES_CONTENT = ("empty", "new_empty", "empty_like", "empty_strided", "set_", "detach", "alias")


@dataclass(frozen=True)
class Finding:
    """The first result that is not finite.

    Attributes:
        phase: `forward` or `backward`.
        module: canonical name of the innermost module at work; `loss` outside of all.
        operation: torch's name of the operation.
        row, position: in the micro-batch, where the result's shape tells; else None.
        micro_batch: number in the step.
        sample: number of the sample in the data order, where the row is known.
    """

    phase: str
    module: str
    operation: str
    micro_batch: int
    row: int | None = None
    position: int | None = None
    sample: int | None = None

    @property
    def layer(self) -> int | None:
        """Number of the layer that the module belongs to."""
        parts = self.module.split(".")
        return int(parts[1]) if parts[0] == "layers" and len(parts) > 1 and parts[1].isdecimal() else None


class _Found(Exception):
    """Ends the step at the first finding."""


class Autopsy(TorchDispatchMode):
    """Watches a step. Use as a context manager around it, inside of `watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.finding: Finding | None = None
        self._stack: list[str] = []
        self._backward: str | None = None
        self._batch: Batch | None = None
        self._number = -1

    def begin(self, batch: Batch) -> None:
        """The next micro-batch comes."""
        self._batch, self._number, self._backward = batch, self._number + 1, None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it made."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        bad_before = any(_bad(t) is not None for t in given) if name not in _MAKES_CONTENT else True
        out = func(*args, **(kwargs or {}))
        if not bad_before:
            for tensor in tree_leaves(out):
                where = _bad(tensor) if isinstance(tensor, Tensor) else None
                if where is not None:
                    self._note(name, tensor, where)
                    raise _Found
        return out

    def _note(self, operation: str, tensor: Tensor, where: list[int]) -> None:
        row = position = sample = None
        if self._batch is not None:
            rows, length = self._batch.tokens.shape
            if tensor.ndim >= 2 and tuple(tensor.shape[:2]) == (rows, length):
                row, position = where[0], where[1]
            elif tensor.ndim >= 1 and tensor.shape[0] == rows * length:
                row, position = divmod(where[0], length)
            elif tensor.ndim >= 2 and tensor.shape[0] == rows:
                row = where[0]
            if row is not None and self._batch.sample_ids is not None:
                sample = int(self._batch.sample_ids[row])
        phase = "forward" if self._backward is None else "backward"
        module = self._backward or (self._stack[-1] if self._stack else "loss")
        self.finding = Finding(phase, module, operation, max(self._number, 0), row, position, sample)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know which module is at work."""
        handles = []
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(self._enter(name)))
                handles.append(module.register_forward_hook(self._leave(name), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self._stack.append(name)

        return hook

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if self._stack and self._stack[-1] == name:
                self._stack.pop()
            if isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(lambda _: setattr(self, "_backward", name))

        return hook


def _bad(tensor: Tensor) -> list[int] | None:
    """Where the first NaN or plus infinity is; None: nowhere."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return None
    if tensor.is_sparse:  # an embedding's gradient: the rows that were looked up
        tensor = tensor._values()
    bad = torch.isnan(tensor) | (tensor == float("inf"))
    return bad.nonzero()[0].tolist() if bool(bad.any()) else None


def examine(engine: Any, model: nn.Module, batches: list[Batch], tokens: int, step: int) -> Finding | None:
    """Run a step's forward and backward passes, watched; the first finding, or None where all is finite.

    Args:
        engine: castalia.train.engine.LocalEngine; what it accumulates is to be thrown away.
        model: the engine's.
        batches: of the step.
        tokens: valid labels of them.
        step: for dropout.
    """
    watch, original = Autopsy(), engine._loss

    def loss(batch: Batch, *args: Any, **kwargs: Any) -> Any:
        watch.begin(batch)
        return original(batch, *args, **kwargs)

    engine._loss = loss
    try:
        with watch.watching(model), watch:
            engine.forward_backward(batches, tokens, step)
    except _Found:
        pass
    finally:
        engine._loss = original
        engine.store.discard()
    return watch.finding
