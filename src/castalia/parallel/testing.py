"""Run a function in N processes of one gloo job, for tests: yours and ours.

    def exchange(world: World, n: int) -> int: ...
    run_in_processes(4, exchange, 3) -> [result of rank 0, ..., of rank 3]

Starting a process that imports torch takes seconds. So one server process imports torch once
and forks the workers of every call, which then live for that call alone: quick, and no call
sees what another left behind. A worker that raises, dies or exceeds the time ends them all.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "castalia.parallel.parallelize",
]


class WorkerFailed(RuntimeError):
    """A worker raised, died or did not end in time. The message names its rank and holds its traceback.

    Attributes:
        rank: of the first that failed.
    """

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


def run_in_processes(
    processes: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0, joined: bool = True
) -> list[Any]:
    """Call `function(world, *arguments)` in each of several processes; what each returned, by rank.

    Args:
        processes: how many.
        function: importable by its name; it and its arguments and results are pickled.
        timeout: seconds after which the job is ended.
        joined: connect them by gloo before the call.

    Raises:
        WorkerFailed: with the traceback of the rank that failed first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, function.__module__])
    with tempfile.TemporaryDirectory(prefix="castalia-ranks-") as folder:
        meeting = Path(folder) / "meeting" if joined else None
        pipes, workers = [], []
        for rank in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work, args=(theirs, rank, processes, meeting, timeout, function, arguments), daemon=True
            )
            worker.start()
            theirs.close()
            pipes.append(ours)
            workers.append(worker)
        try:
            return _collect(pipes, workers, timeout)
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.join()


def _collect(pipes: list[Connection], workers: list[Any], timeout: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = dict(enumerate(pipes))
    end = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting.values()), max(end - time.monotonic(), 0))
        if not ready:
            late = min(waiting)
            raise WorkerFailed(late, f"rank {late} of {len(pipes)} has not ended after {timeout:g} s")
        failures = []
        for rank, pipe in list(waiting.items()):
            if pipe not in ready:
                continue
            del waiting[rank]
            try:
                when, good, value = pipe.recv()
            except EOFError:
                workers[rank].join(5)
                when, good, value = 0.0, False, f"died with exit code {workers[rank].exitcode}"
            if good:
                results[rank] = value
            else:
                failures.append((when, rank, value))
        if failures:
            # A rank that fails makes the others fail: a death first, then whoever raised first is the one to look at.
            _, rank, text = min(failures)
            raise WorkerFailed(rank, f"rank {rank} of {len(pipes)} failed: {text}")
    return results


def _work(
    pipe: Connection,
    rank: int,
    size: int,
    meeting: Path | None,
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """In the worker: call, and send what came of it before anything else can go wrong."""

    def call(world: Any) -> None:
        try:
            value = function(world, *arguments)
        except BaseException:
            pipe.send((time.monotonic(), False, traceback.format_exc()))
        else:
            pipe.send((time.monotonic(), True, value))
        pipe.close()

    import torch

    from castalia.parallel.world import World, joined

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    world = World(rank, size, torch.device("cpu"), rank)
    if meeting is None:
        call(world)
    else:
        with joined(world, timedelta(seconds=timeout), f"file://{meeting}"):
            call(world)
    os._exit(0)
