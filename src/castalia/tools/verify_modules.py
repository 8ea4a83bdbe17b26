"""Which module makes a layout differ from one process: the first one that errs, forward, else backward.

    every module ──output, and gradient of it──> put together from all ranks ──against one process──> the guilty one

    forward     embedding ─> layers.0 ─> ... ─> loss    the first whose output differs was given right inputs
    backward    embedding <─ layers.0 <─ ... <─ loss    the first that passes on a wrong gradient got a right one
    else        gradients of parameters, which ranks sum; else the update

Every parameter's gradient is wrong once the loss is, so the names of parameters alone lead astray. Watched are the
modules whose outputs are as wide as the residual stream: these are whole on each rank, or cut by tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from castalia.tools.verify_compare import Seen, Trace, differences, finite, relative

_WATCHED = re.compile(
    r"embedding|final_norm|layers\.\d+(\.(attention_norm|attention|mlp_norm|mlp|norm|gate|down))?", re.ASCII
)


class Watched:
    """Notes outputs of modules, and the gradients of these, from now on.

    Args:
        model: whole, or a rank's part of it.
        width: of the residual stream.
    """

    def __init__(self, model: nn.Module, width: int) -> None:
        self._width, self._noting = width, True
        self._outputs: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, dict[int, Tensor]] = {}
        self._order: list[str] = []
        for name, module in model.named_modules():
            if _WATCHED.fullmatch(name):
                # Tensor parallelism hangs its exchange behind the last norm: before it, gradients are whole.
                module.register_forward_hook(partial(self._note, name), prepend=name == "final_norm")

    def _note(self, name: str, module: nn.Module, inputs: Any, out: Any) -> None:
        again = torch._C._current_graph_task_id() != -1  # a layer that is computed again in the backward pass
        if (
            not self._noting
            or again
            or not torch.is_grad_enabled()
            or not isinstance(out, Tensor)
            or out.shape[-1] != self._width
        ):
            return
        calls, gradients = self._outputs.setdefault(name, []), self._gradients.setdefault(name, {})
        number = len(calls)
        calls.append(out.detach().float().cpu().clone())
        self._order.append(name)
        if out.requires_grad:

            def keep(gradient: Tensor) -> None:
                gradients[number] = gradient.detach().float().cpu().clone()

            out.register_hook(keep)

    def seen(self, micro_batches: int, held: np.ndarray, tensor: int) -> dict[str, Seen]:
        """What was noted in a step, by module; `module, time N` where it is executed several times. Ends the watch.

        Args:
            micro_batches: of the step on this rank.
            held: numbers of the tokens of a sequence on this context rank.
            tensor: number of this rank among the tensor-parallel ones.
        """
        self._noting = False
        out: dict[str, Seen] = {}
        times: dict[str, int] = {}
        for name in self._order:
            each = len(self._outputs[name]) // micro_batches
            time = times[name] = times.get(name, -1) + 1
            if time >= each:
                continue
            # What a pipeline computes to learn the shapes comes before what counts.
            left = len(self._outputs[name]) - each * micro_batches
            numbers = range(left + time, left + each * micro_batches, each)
            output = torch.cat([self._outputs[name][i] for i in numbers])
            kept = [self._gradients[name][i] for i in numbers if i in self._gradients[name]]
            gradient = torch.cat(kept).numpy() if len(kept) == micro_batches else None
            first = tensor * output.shape[1] if output.shape[1] < len(held) else 0
            tokens = held[first : first + output.shape[1]]
            out[name if each == 1 else f"{name}, time {time + 1}"] = Seen(output.numpy(), gradient, tokens)
        return out


def guilty(expected: Trace, traces: Sequence[Trace], tolerance: float) -> str | None:
    """The part of a step to look into, in words; None where nothing that was compared differs.

    Args:
        expected: of one process, watched.
        traces: of all ranks, watched.
        tolerance: largest relative difference.
    """
    order = list(expected.modules)
    for name in order:
        if _apart(name, "output", expected, traces) > tolerance:
            return f"{name} (its output)"
    if max(relative(t.losses[:1], expected.losses[:1]) for t in traces) > tolerance:
        return "the loss"
    for place in reversed(range(len(order))):
        if _apart(order[place], "gradient", expected, traces) > tolerance:
            after = order[place + 1] if place + 1 < len(order) else "the loss"
            return f"{after} (the gradient that it passes on)"
    apart = differences("gradients", expected, traces)
    beyond = [name for name, difference in apart.items() if difference > tolerance]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in reversed(beyond)))  # from the head down
    if beyond and len(beyond) == len(apart):
        return "the sum of gradients over the ranks"
    if modules:
        others = f", and those of {len(modules) - 1} others" if len(modules) > 1 else ""
        return f"{modules[0]} (its gradients{others})"
    updates = differences("weights", expected, traces)
    return next((f"{n.rpartition('.')[0]} (its update)" for n, d in updates.items() if d > tolerance), None)


def _apart(name: str, kind: str, expected: Trace, traces: Sequence[Trace]) -> float:
    """The largest difference of a module's outputs or of their gradients, relative to the largest number."""
    reference: np.ndarray | None = getattr(expected.modules[name], kind)
    if reference is None:
        return 0.0
    row = {sample: i for i, sample in enumerate(expected.samples[0])}
    scale = max(float(np.abs(reference).max()), 1e-30)
    worst = 0.0
    for trace in traces:
        seen = trace.modules.get(name)
        value: np.ndarray | None = None if seen is None else getattr(seen, kind)
        if seen is None or value is None:
            continue
        rows = [row[sample] for sample in trace.samples[0]]
        mine = reference[rows][:, seen.tokens]
        worst = max(worst, finite(float(np.abs(value - mine).max()) / scale))
    return worst
