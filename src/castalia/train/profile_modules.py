"""One step -> what each module of the model takes: seconds, FLOPs, bytes kept for the backward pass.

    module called ──open──┐                       ┌── node of the graph runs ──open
        operations        ├─ a stack of intervals ┤        operations
    module returns ─close─┘                       └── node is done ──close

Forward intervals are module calls. In the backward pass autograd runs nodes, not modules; so when a module returns, the
nodes between its inputs and its outputs that no inner module has claimed are marked as its own, and each of these
opens an interval when it runs. A layer that is computed again in the backward pass (performance.recompute) opens module
intervals inside a node's. What an interval takes is its own but for what the intervals inside it take.

Time and counts are taken in passes of their own, as counting slows every operation. Counted are matrix products and
attention, two FLOPs for a multiplication and an addition, attention over the whole square and its backward pass as
twice the forward one, as `castalia plan` reckons: what a fused kernel computes again is left out. Kept are
storages that autograd saves, each once, for the module that saved it first; weights are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from castalia.train.engine import Engine
from castalia.train.profile_timers import Clock

HEAD = "head"
"""The output matrix and the loss, which is no module: the chunked loss reads the matrix itself."""
PHASES = ("forward", "backward", "recompute")
Taken = dict[tuple[str, str], float]
"""By module and phase, what the module took itself, its inner modules left out."""


class ModuleWatch:
    """Watches the steps that are made while it is entered.

    Args:
        model: whose modules are told apart.
        engine: that calls it, and the loss.
        clock: of the device; None: FLOPs and bytes are counted instead of time.
        ranges: also make each interval a range of the module's name in torch's trace.
    """

    def __init__(self, model: nn.Module, engine: Engine, clock: Clock | None, ranges: bool = False) -> None:
        self._model, self._engine, self._clock = model, cast(Any, engine), clock
        self._names = {module: name for name, module in model.named_modules()}
        self._intervals: list[list[Any]] = []  # module, phase, start, end, number of the interval around it
        self._stack: list[int] = []
        self._ranges: list[Any] | None = [] if ranges else None
        self._claimed: set[Any] = set()
        self._handles: list[Any] = []
        self.flops: Taken = {}
        self.calls: dict[str, int] = {}
        self._micro_batches: list[dict[str, int]] = []
        self._seen: set[int] = set()
        self._weights: set[int] = set()
        self._opened = ExitStack()

    def __enter__(self) -> ModuleWatch:
        engine, names = self._engine, self._names
        for module, name in names.items():
            # Always: a layer that is computed again is left, by an exception, once it has what it needs.
            self._opened.callback(module.register_forward_pre_hook(partial(self._called, name)).remove)
            self._opened.callback(module.register_forward_hook(partial(self._returned, name), always_call=True).remove)
        plain: Callable[..., Any] = engine.loss_sums
        self._opened.callback(setattr, engine, "loss_sums", plain)
        engine.loss_sums = self._watched(plain)
        if self._clock is None:
            self._opened.enter_context(saved_tensors_hooks(self._keep, lambda tensor: tensor))
            self._opened.enter_context(_Counter(self._count))
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.close()
        self._forget()

    @property
    def kept(self) -> dict[str, int]:
        """Bytes by module, of the micro-batch that keeps most."""
        return max(self._micro_batches, key=lambda kept: sum(kept.values()), default={})

    def seconds(self) -> Taken:
        """What the intervals took."""
        assert self._clock is not None, "counts have no time"
        lasted = [self._clock.between(start, end) for _, _, start, end, _ in self._intervals]
        own = list(lasted)
        for (*_, around), time in zip(self._intervals, lasted, strict=True):
            if around >= 0:
                own[around] -= time
        taken: Taken = {}
        for (name, phase, *_), time in zip(self._intervals, own, strict=True):
            taken[name, phase] = taken.get((name, phase), 0.0) + time
        return taken

    # Intervals.

    def _open(self, name: str, phase: str) -> None:
        start = None if self._clock is None else self._clock.now()
        self._intervals.append([name, phase, start, None, self._stack[-1] if self._stack else -1])
        self._stack.append(len(self._intervals) - 1)
        if self._ranges is not None:
            self._ranges.append(record_function(f"{name or 'model'} {phase}"))
            self._ranges[-1].__enter__()

    def _close(self) -> None:
        if self._ranges is not None:
            self._ranges.pop().__exit__(None, None, None)
        self._intervals[self._stack.pop()][3] = None if self._clock is None else self._clock.now()

    def _now(self) -> tuple[str, str]:
        """The module and phase that run; what lies outside of all is the whole model's."""
        if self._stack:
            name, phase, *_ = self._intervals[self._stack[-1]]
            return name, phase
        return "", "backward" if _in_backward() else "forward"

    # Modules and nodes.

    def _called(self, name: str, module: nn.Module, inputs: Any) -> None:
        again = _in_backward()
        if not again:
            if module is self._model:  # another micro-batch: the graph of the one before is done with
                self._forget()
                self._micro_batches.append({})
                self._weights = {_storage(w).data_ptr() for w in module.parameters()}
            # Weights as they are now: working copies, or gathered from all ranks.
            self._weights.update(_storage(w).data_ptr() for w in module.parameters(recurse=False))
            self._claim(inputs, self._now()[0])
            self.calls[name] = self.calls.get(name, 0) + 1
        self._open(name, "recompute" if again else "forward")

    def _returned(self, name: str, module: nn.Module, inputs: Any, out: Any) -> None:
        if not _in_backward():
            self._claim(out, name)
        self._close()

    def _watched(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(loss)  # so that an engine that asks which loss it has is not misled
        def watched(hidden: Tensor, *args: Any, **more: Any) -> Any:
            self._claim(hidden, "")
            self.calls[HEAD] = self.calls.get(HEAD, 0) + 1
            self._open(HEAD, "forward")
            out = loss(hidden, *args, **more)
            self._claim(out, HEAD)
            self._close()
            return out

        return watched

    def _claim(self, values: Any, name: str) -> None:
        """Mark as a module's the nodes that lead to these tensors, as far as no other has claimed them."""
        waiting = [t.grad_fn for t in tree_leaves(values) if isinstance(t, Tensor)]
        while waiting:
            node = waiting.pop()
            if node is None or node in self._claimed:
                continue
            self._claimed.add(node)
            self._handles.append(node.register_prehook(partial(self._node_runs, name)))
            self._handles.append(node.register_hook(self._node_is_done))
            waiting.extend(before for before, _ in node.next_functions)

    def _node_runs(self, name: str, gradients: Any) -> None:
        self._open(name, "backward")

    def _node_is_done(self, given: Any, gradients: Any) -> None:
        self._close()

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._claimed.clear()
        self._seen.clear()

    # Counts.

    def _count(self, flops: int) -> None:
        if not self._stack and not _in_backward():
            return  # an optimizer that multiplies matrices
        now = self._now()
        self.flops[now] = self.flops.get(now, 0) + flops

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        key = storage.data_ptr()
        if key not in self._seen and key not in self._weights and self._micro_batches:
            self._seen.add(key)
            kept, name = self._micro_batches[-1], self._now()[0]
            kept[name] = kept.get(name, 0) + storage.nbytes()
        return tensor


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """The memory behind a tensor; of one that is spread over ranks, behind the part that is here."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


# Matrix products by the name of the operation: which argument is the first factor.
_PRODUCTS = {
    "mm": 0,
    "bmm": 0,
    "mv": 0,
    "addmm": 1,
    "addmm_": 1,
    "baddbmm": 1,
    "baddbmm_": 1,
    "addmv": 1,
    "_scaled_mm": 0,
    "_grouped_mm": 0,
    "_scaled_grouped_mm": 0,
}


class _Counter(TorchDispatchMode):
    """Tells the FLOPs of each operation that multiplies matrices."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flops = operation_flops(func._schema.name.split("::")[-1], args, out)
        if flops:
            self._tell(flops)
        return out


def operation_flops(name: str, args: Any, out: Any) -> int:
    """FLOPs of one operation; 0 for what multiplies no matrices.

    Args:
        name: without its overload.
        args: as it was called with.
        out: what it returned.
    """
    if name in _PRODUCTS:
        first, second = args[_PRODUCTS[name]], args[_PRODUCTS[name] + 1]
        if "grouped" in name and first.ndim == second.ndim == 2:  # a product for each group of the inner dimension
            return int(2 * first.numel() * second.shape[-1])
        return int(2 * out.numel() * first.shape[-1])
    if name == "grouped_linear":  # of castalia.model.moe, as the one below
        return int(2 * args[0].numel() * args[1].shape[1])
    if name == "grouped_linear_backward":
        return int(4 * args[0].numel() * args[2].shape[2])
    if name.startswith("_scaled_dot_product") or name.startswith(("_flash_attention", "_efficient_attention")):
        backward = name.endswith("_backward")
        query, key, value = args[backward : backward + 3]  # `[B, n, S, d]`
        square = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        return int(2 * square * (query.shape[3] + value.shape[3])) * (2 if backward else 1)
    return 0
