"""The training loop, on one screen.

Everything it touches was assembled in `run.py`; nothing here knows how weights are held, how
data is read or where a checkpoint goes. A signal is noticed between steps: the step that
runs is finished, saved, and the process leaves with exit code 3.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from castalia.errors import UserError
from castalia.optim import learning_rate

if TYPE_CHECKING:
    from castalia.train.run import Run

Callback = Callable[["Run"], None]


class Stopped(Exception):
    """A signal, or training.exit_interval, ended the run early; its state is saved."""


class Diverged(UserError):
    """The loss or the gradient is no longer a number."""


def train_loop(run: Run, callbacks: Sequence[Callback] = ()) -> None:
    """Train from `run.step` to the last step.

    Raises:
        Stopped: after a signal or at training.exit_interval, with the state saved.
        Diverged: loss or gradient norm is not finite; the weights of that step are not saved.
    """
    cfg = run.config
    steps, clip = run.steps, cfg.optimizer.clip_grad
    with _signals() as caught, closing(run.loader.stream(run.step, steps)) as batches:
        if run.step == 0 and 0 in cfg.checkpoint.extra_steps:
            run.save()
        started = time.perf_counter()
        for micro_batches in batches:
            spec = run.loader.plan.at(run.step)
            lr = learning_rate(run.updates, cfg.optimizer.lr, cfg.schedule, steps)

            # One step.
            tokens = sum(batch.num_tokens for batch in micro_batches)
            stats = run.engine.forward_backward(micro_batches, tokens, spec.step)
            norm = run.store.gradient_norm()
            grad_norm = norm.item()
            if not (math.isfinite(stats.loss) and math.isfinite(grad_norm)):
                raise Diverged(
                    f"step {spec.step + 1}: loss {stats.loss} and gradient norm {grad_norm} are not finite; the newest "
                    f"checkpoint is from before: lower optimizer.lr, or look at the data of this step"
                )
            clipped = clip > 0 and grad_norm > clip
            run.store.step(lr, divisor=(norm + 1e-6) / clip if clipped else None)
            run.step, run.updates = spec.step + 1, run.updates + 1
            run.tokens += spec.num_samples * spec.seq_length
            run.record_step(stats, lr, grad_norm, time.perf_counter() - started)

            # Once in a while.
            last, stop = run.step == steps, bool(caught)
            leave = cfg.training.exit_interval is not None and run.step % cfg.training.exit_interval == 0
            if due(run.step, cfg.evaluation.interval) or (last and cfg.evaluation.at_end):
                run.evaluate("valid")
            for callback in callbacks:
                callback(run)
            if (
                last
                or stop
                or leave
                or due(run.step, cfg.checkpoint.interval)
                or run.step in cfg.checkpoint.extra_steps
            ):
                run.save(required=last or stop or leave)
            if not last and (stop or leave):
                why = signal.Signals(caught[0]).name if stop else f"training.exit_interval {cfg.training.exit_interval}"
                raise Stopped(f"stopped by {why} after step {run.step}; the same command goes on from there")
            started = time.perf_counter()
        if cfg.evaluation.test_at_end:
            run.evaluate("test")


def due(step: int, interval: int | None) -> bool:
    """Whether something that happens every `interval` steps happens after this one."""
    return interval is not None and step % interval == 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one is as deadly as ever."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def handler(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        before = {n: signal.signal(n, handler) for n in numbers}
    except ValueError:  # not in the main thread: signals are someone else's business
        yield caught
        return
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)
