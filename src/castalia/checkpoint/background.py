"""Tensors -> a copy in host memory -> whatever takes long with it, in a thread, while training goes on.

    step ─> copy (the step waits) ─> next step ─> ...
               └─> thread: write, hash, fsync, rename, upload ─> result, asked for by poll() or wait()

A thread and not a process: hashing, writing and fsync all leave the interpreter lock, and a process
would need a second copy of everything. The copy's buffers are made once and reused; on an accelerator
they are pinned. One job runs at a time, so that one copy is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from castalia.checkpoint.tensors import Piece, flatten

T = TypeVar("T")


class Background(Generic[T]):
    """Runs one job at a time over a copy of some tensors."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future: Future[T] | None = None

    @torch.no_grad()
    def copied(self, tensors: Mapping[str, Any]) -> dict[str, Tensor | Piece]:
        """The tensors, or pieces of tensors, in buffers of this object; those of the last copy are overwritten."""
        flat = flatten(tensors)
        local = {name: held.local if isinstance(held, Piece) else held for name, held in flat.items()}
        if {n: (b.shape, b.dtype) for n, b in self._buffers.items()} != {
            n: (t.shape, t.dtype) for n, t in local.items()
        }:
            self._buffers = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
                for name, tensor in local.items()
            }
        for name, tensor in local.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        if any(tensor.device.type != "cpu" for tensor in local.values()):
            torch.accelerator.synchronize()
        return {
            name: Piece(self._buffers[name], held.shape, held.offset)
            if isinstance(held, Piece)
            else self._buffers[name]
            for name, held in flat.items()
        }

    def start(self, tensors: Mapping[str, Any], job: Callable[[Mapping[str, Any]], T]) -> None:
        """Copy the tensors and begin the job over the copy; the last one must have been waited for."""
        if self._future is not None:
            raise RuntimeError("one job at a time: wait() for the last one first")
        held = self.copied(tensors)
        self._future = self._threads.submit(job, held)

    @property
    def busy(self) -> bool:
        """Whether a job runs now."""
        return self._future is not None and not self._future.done()

    def poll(self) -> T | None:
        """What the last job gave, once, if it has ended; raises what it raised."""
        return None if self.busy else self.wait()

    def wait(self) -> T | None:
        """Wait for the job, if there is one: what it gave, or raised."""
        future, self._future = self._future, None
        return None if future is None else future.result()

    def close(self) -> None:
        """End the thread, when its job is done."""
        self._threads.shutdown()
