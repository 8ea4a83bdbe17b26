"""Where a step's time goes, phase by phase: data, forward, backward, reduce, clip, optimizer; validation, saving.

    with timers("forward"): ...  ─> a pair of moments ──take, at each record──> seconds of each phase

A moment is the host's clock on a CPU. On an accelerator, which runs behind the host, it is an event on the
device's own time line: nobody waits for it, and what the device has not reached yet is taken with the next record.
With `synchronise` the host waits for the device at every moment instead (profile.synchronise). Each phase is
also a range of that name in torch's traces.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch.profiler import record_function

T = TypeVar("T")
_END: Any = object()
OFTEN = ("data", "forward", "backward", "forward-backward", "reduce", "clip", "optimizer")
"""Phases that every step has; others are of once in a while."""


class Clock:
    """Moments on the time line of a device.

    Args:
        device: whose.
        synchronise: wait for the device and take the host's clock.
    """

    def __init__(self, device: torch.device, synchronise: bool = False) -> None:
        self._device, self._synchronise = device, synchronise and device.type != "cpu"
        self._events = device.type != "cpu" and not synchronise

    def now(self) -> Any:
        """This moment."""
        if self._events:
            event = torch.Event(device=self._device.type, enable_timing=True)
            event.record()
            return event
        if self._synchronise:
            torch.accelerator.synchronize()
        return time.perf_counter()

    def reached(self, moment: Any) -> bool:
        """Whether the device has come there."""
        return bool(moment.query()) if self._events else True

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one moment to another, both reached, or waited for."""
        if not self._events:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class Timers:
    """Seconds by phase since they were last taken.

    Args:
        device: that the phases run on.
        synchronise: see Clock.
    """

    def __init__(self, device: torch.device | None = None, synchronise: bool = False) -> None:
        self.clock = Clock(device or torch.device("cpu"), synchronise)
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as a phase."""
        # A range costs more than both looks at the clock, so there is one only where somebody records.
        with record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext():
            start = self.clock.now()
            try:
                yield
            finally:
                self._spans.append((name, start, self.clock.now()))

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; waiting for each is the phase."""
        iterator = iter(items)
        while True:
            with self(name):
                item = next(iterator, _END)
            if item is _END:
                self._spans.pop()
                return
            yield item

    def take(self, steps: int = 1) -> dict[str, float]:
        """Mean seconds of each phase: per step, and of what comes once in a while per time. Forgets them."""
        total: dict[str, list[float]] = {}
        left = []
        for span in self._spans:
            name, start, end = span
            if not self.clock.reached(end):
                left.append(span)
                continue
            total.setdefault(name, []).append(self.clock.between(start, end))
        self._spans = left
        return {n: sum(found) / (max(steps, 1) if n in OFTEN else len(found)) for n, found in total.items()}
