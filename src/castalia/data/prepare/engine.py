"""Blocks -> their parts, several at once, in the order of the blocks.

    reader thread ──bounded queue──> n threads ──> parts in order
                                       ├ threads:   encode here (tokenizers run outside Python's lock)
                                       ├ processes: send to a process of its own, wait for the answer
                                       └ ray:       the same with an actor of a Ray cluster

A thread stands for each worker, whatever the worker is; so one loop keeps the order and bounds
what is in memory: 2 blocks for each worker, and as many waiting.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from castalia.data.prepare.recipes import Parts
from castalia.data.sources import Block
from castalia.errors import UserError

ENGINES = ("threads", "processes", "ray")


class WorkerDied(UserError):
    """A worker process is gone; what was done stays."""


class Encodes(Protocol):
    """What is done to a block."""

    def encode(self, block: Block) -> Parts:
        """The parts of a block."""


def encoded(
    blocks: Iterator[Block], recipe: Encodes, workers: int, engine: str = "threads"
) -> Generator[tuple[Block, Parts], None, None]:
    """Encode blocks; results come in their order, a bounded number of them at once.

    Raises:
        UserError: an engine that is not known or not installed.
    """
    if engine not in ENGINES:
        raise UserError(f"there is no engine {engine!r}: choose one of {', '.join(ENGINES)}")
    start = {"threads": _threads, "processes": _processes, "ray": _ray}[engine]
    with start(recipe, workers) as encoders, ThreadPoolExecutor(workers) as pool:
        free: queue.SimpleQueue[Callable[[Block], Parts]] = queue.SimpleQueue()
        for encode in encoders:
            free.put(encode)

        def work(block: Block) -> Parts:
            encode = free.get()
            try:
                return encode(block)
            finally:
                free.put(encode)

        pending: deque[tuple[Block, Future[Parts]]] = deque()
        try:
            with contextlib.closing(_ahead(blocks, 2 * workers)) as ready:
                for block in ready:
                    pending.append((block, pool.submit(work, block)))
                    if len(pending) > 2 * workers:
                        first, future = pending.popleft()
                        yield first, future.result()
                while pending:
                    first, future = pending.popleft()
                    yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _ahead(blocks: Iterator[Block], depth: int) -> Generator[Block, None, None]:
    """The same blocks, read in a thread of their own, at most `depth` ahead."""
    waiting: queue.Queue[Block | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(what: Block | BaseException | None) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(what, timeout=0.1)
                return True
        return False

    def read() -> None:
        try:
            for block in blocks:
                if not put(block):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, name="reader", daemon=True)
    thread.start()
    try:
        while (what := waiting.get()) is not None:
            if isinstance(what, BaseException):
                raise what
            yield what
    finally:
        stopped.set()
        thread.join(timeout=5)


@contextlib.contextmanager
def _threads(recipe: Encodes, workers: int) -> Iterator[list[Callable[[Block], Parts]]]:
    yield [recipe.encode] * workers


@contextlib.contextmanager
def _processes(recipe: Encodes, workers: int) -> Iterator[list[Callable[[Block], Parts]]]:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    encoders: list[Callable[[Block], Parts]] = []
    processes, ends = [], []
    try:
        for _ in range(workers):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(mine)
            encoders.append(_asking(mine))
        with _death_noticed():
            for end in ends:  # not as an argument, on which a start that fails would hang
                end.send(recipe)
        yield encoders
    finally:
        for end in ends:
            end.close()  # which ends the process's loop
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()


@contextlib.contextmanager
def _death_noticed() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise WorkerDied("a worker has died (killed, or out of memory?): run the same command to go on") from None


def _asking(connection: Any) -> Callable[[Block], Parts]:
    def ask(block: Block) -> Parts:
        with _death_noticed():
            connection.send(block)
            answer = connection.recv()
        if isinstance(answer, BaseException):
            raise answer
        result: Parts = answer
        return result

    return ask


def _serve(connection: Any) -> None:
    """The loop of a worker process: first the recipe comes, then blocks."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    recipe: Encodes = connection.recv()
    while True:
        try:
            block = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Any = recipe.encode(block)
        except Exception as error:
            answer = error
        connection.send(answer)


@contextlib.contextmanager
def _ray(recipe: Encodes, workers: int) -> Iterator[list[Callable[[Block], Parts]]]:
    try:
        import ray
    except ImportError:
        raise UserError("the engine ray needs a package: pip install 'castalia[ray]'") from None
    started = not ray.is_initialized()
    if started:
        # RAY_ADDRESS joins a cluster that runs; without it one is started on this machine.
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        actor = ray.remote(num_cpus=1)(_Actor)
        actors = [actor.remote(recipe) for _ in range(workers)]

        def asking(one: Any) -> Callable[[Block], Parts]:
            def ask(block: Block) -> Parts:
                try:
                    result: Parts = ray.get(one.encode.remote(block))
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                return result

            return ask

        yield [asking(one) for one in actors]
    finally:
        if started:
            ray.shutdown()


class _Actor:
    def __init__(self, recipe: Encodes) -> None:
        self._recipe = recipe

    def encode(self, block: Block) -> Parts:
        return self._recipe.encode(block)
