"""The training loop, on one screen.

Everything it touches was assembled in `run.py`; nothing here knows how weights are held, how
data is read or where a checkpoint goes. A signal is noticed between steps: the step that
runs is finished, saved, and the process leaves with exit code 3.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from castalia.config import CheckpointConfig
from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.optim import learning_rate
from castalia.train.controller import control_batch
from castalia.train.guard import step_around

if TYPE_CHECKING:
    from castalia.train.run import Run

Callback = Callable[["Run"], None]


class Stopped(Exception):
    """A signal, or training.exit_interval, ended the run early; its state is saved."""


class Diverged(UserError):
    """The loss or the gradient is no longer a number, and the run is to stop there or has skipped too many updates."""


SKIPS_AT_MOST = 50
"""Updates skipped in a row after which a run stops, as GPT-NeoX's does."""


def train_loop(run: Run, callbacks: Sequence[Callback] = ()) -> None:
    """Train from `run.step` to the last step.

    Raises:
        Stopped: after a signal or at training.exit_interval, with the state saved.
        Diverged: loss or gradient norm is not finite (with training.nonfinite skip: too often in a row); the
            weights of that step are not saved.
    """
    cfg = run.config
    steps, clip = run.steps, cfg.optimizer.clip_grad
    with _signals() as caught, closing(_batches(run)) as batches:
        timers = run.profiling.timers
        if run.step == 0 and not run.resumed and 0 in cfg.checkpoint.extra_steps:
            run.save()
        if run.resumed:
            _evaluate_if_due(run)  # a signal or a kill may have come between saving and validating
        started, skipped = time.perf_counter(), 0
        for micro_batches in timers.each("data", batches):
            run.beat()
            spec = run.loader.plan.at(run.step)
            run.profiling.before(run, spec.step + 1)
            lr = learning_rate(run.updates, cfg.optimizer.lr, cfg.schedule, steps)

            # One step.
            tokens = run.parts.count(sum(batch.num_tokens for batch in micro_batches))
            if run.scaler is not None:
                run.engine.loss_scale = run.scaler.scale
            stats = run.engine.forward_backward(micro_batches, tokens, spec.step)
            with timers("clip"):
                if run.scaler is not None:
                    run.scaler.unscale(run.store.gradient_buffers())
                norm = run.store.gradient_norm()
                grad_norm = norm.item()
            run.before_update()
            finite = math.isfinite(stats.loss) and math.isfinite(grad_norm)
            if finite or run.scaler is None:  # in fp16 an overflow is no spike
                why = run.guard.judge(stats.loss, grad_norm)
                if why is not None:
                    step_around(run, spec, stats, grad_norm, why)
                    continue
            scalable = run.scaler is None or run.scaler.update(finite)
            if finite:
                clipped = clip > 0 and grad_norm > clip
                with timers("optimizer"):
                    run.store.step(lr, divisor=(norm + 1e-6) / clip if clipped else None)
                    run.engine.updated()
                run.updates, skipped = run.updates + 1, 0
            else:
                skipped += 1
                _check_skips(run, skipped, spec.step + 1, stats.loss, grad_norm, scalable)
                run.store.discard()
            run.step = spec.step + 1
            run.tokens += spec.num_samples * spec.seq_length
            run.record_step(stats, lr, grad_norm, time.perf_counter() - started)
            run.profiling.after(run, run.step)
            control_batch(run)
            run.beat()

            # Once in a while.
            last = run.step == steps
            stop = run.mesh.agreed(caught)
            leave = cfg.training.exit_interval is not None and run.step % cfg.training.exit_interval == 0
            # The state first: whoever sent a signal may not wait for a long validation.
            saved = bool(stop) or last or leave or saves(run.step, cfg.checkpoint)
            if saved:
                run.beat("saving a checkpoint")
                run.save(required=bool(stop) or last or leave)
            if not stop:
                run.beat("evaluating")
                _evaluate_if_due(run)
                for callback in callbacks:
                    run.beat("in a callback")
                    callback(run)
            if stop and not saved:
                run.save()
            if stop or (leave and not last):
                why = f"training.exit_interval {cfg.training.exit_interval}"
                why = signal.Signals(stop[0]).name if stop else why
                raise Stopped(f"stopped by {why} after step {run.step}; the same command goes on from there")
            run.beat("reading the next batch")
            started = time.perf_counter()
        if cfg.evaluation.test_at_end and not run.tested:
            run.evaluate("test")


def _batches(run: Run) -> Generator[list[Batch], None, None]:
    """Micro-batches of each step from `run.step` on; begun anew where the plan has changed meanwhile."""
    while run.step < run.steps:
        plan = run.loader.plan
        with closing(run.loader.stream(run.step, run.steps)) as batches:
            for micro_batches in batches:
                yield micro_batches
                if run.loader.plan is not plan:
                    break


def _evaluate_if_due(run: Run) -> None:
    """Validate, and let the model write, after this step if that is due and no earlier sitting did."""
    cfg = run.config.evaluation
    wanted = due(run.step, cfg.interval) or (run.step == run.steps and cfg.at_end)
    if wanted and run.step > 0 and run.last.get("valid", {}).get("step") != run.step:
        run.evaluate("valid")
    every = run.config.sampling.interval
    wanted = every is not None and (due(run.step, every) or run.step == run.steps)
    if wanted and run.step > 0 and run.last.get("samples", {}).get("step") != run.step:
        run.sample()


def due(step: int, interval: int | None) -> bool:
    """Whether something that happens every `interval` steps happens after this one."""
    return interval is not None and step % interval == 0


def saves(step: int, cfg: CheckpointConfig) -> bool:
    """Whether a checkpoint is due after this step, by the configuration alone."""
    if step in cfg.extra_steps:
        return True
    if cfg.scale == "linear":
        return due(step, cfg.interval)
    factor, power = cfg.log_factor or 2.0, 0
    while int(factor**power) < step:
        power += 1
    return step > 0 and int(factor**power) == step


def _check_skips(run: Run, skipped: int, step: int, loss: float, grad_norm: float, scalable: bool) -> None:
    """Raise Diverged where a step without finite numbers is not to be skipped; in fp16 they may come of the scale."""
    what = f"step {step}: loss {loss} and gradient norm {grad_norm} are not finite"
    saved = f"the newest checkpoint is {run.saved}" if run.saved else "no checkpoint was written yet"
    if not scalable:
        raise Diverged(
            f"{what} though the loss scale is as small as training.min_loss_scale {run.config.training.min_loss_scale} "
            f"lets it be; {saved}: lower optimizer.lr, look at the data of this step, or set training.precision=bf16"
        )
    if run.scaler is None and run.config.training.nonfinite == "stop":
        raise Diverged(
            f"{what}; {saved}: lower optimizer.lr, look at the data of this step, "
            "or leave such steps out with training.nonfinite=skip"
        )
    if skipped >= SKIPS_AT_MOST:
        raise Diverged(
            f"{what}, as in the {skipped - 1} steps before; {saved}: lower optimizer.lr, or look at the data"
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of dying; a second one is as deadly as ever."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, old in before.items():
            # None: a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if old is None else old)

    def handler(number: int, _: object) -> None:
        caught.append(number)
        restore()

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM), int(getattr(signal, "SIGHUP", signal.SIGTERM))):
            before[number] = signal.getsignal(number)
        for number in before:
            signal.signal(number, handler)
    except ValueError:  # not in the main thread: signals are someone else's business
        yield caught
        return
    try:
        yield caught
    finally:
        restore()
