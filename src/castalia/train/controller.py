"""The batch that grows along the critical batch size (batch_controller), while the run goes on.

    noise scale, 95% from low on ──larger batch <= fraction x low?──> journal: Resize(from_step, size) ──> plan

The interval's lower end makes it slow to believe: a batch grows when the noise is surely large enough. It never
shrinks, for a smaller one would learn as much from as many tokens, only slower. What is decided is an entry of
the journal, so that a checkpoint, a replay and `castalia data` know which samples a step has; the window that
it was decided by is in the checkpoint as well, so a run that goes on decides as one that was never stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from castalia.config import Config
from castalia.data.plan import Rebatch, Resize, Skip
from castalia.errors import UserError
from castalia.parallel.layout import Layout

if TYPE_CHECKING:
    from castalia.train.run import Run


def control_batch(run: Run) -> None:
    """After a step: let the batch be larger from the next one on, if it is time. Every rank calls it."""
    cfg, most = run.config.batch_controller, run.config.training.batch_size
    if cfg.start is None or run.step >= run.steps:
        return
    size = run.loader.plan.at(run.step).num_samples
    if size >= most or not _may_change(run, size):
        return
    larger, found = min(size * cfg.factor, most), run.noise.in_sequences()
    low, high = found.get("low"), found.get("high")
    # All ranks have the same numbers; that they do the same must not hang on the last bit of them.
    if not run.mesh.from_first(low is not None and larger <= cfg.fraction * low):
        return
    run.replan((*run.journal, Resize(run.step, larger)))
    above = "on" if high is None else f"to {high:.4g}"
    text = f"{size} -> {larger} sequences from step {run.step + 1} on: the noise scale is from {low or 0:.4g} {above}"
    run.metrics.write("event", run.step, event="batch", text=text)
    run.console.say(f"the batch grows: {text}")


def _may_change(run: Run, size: int) -> bool:
    """Whether the last change is long enough ago, and no entry of the journal counts steps that are still to come.

    A rollback leaves such entries: what they leave out is counted in batches of the sizes that they were made with.
    """
    last = 0
    for entry in run.journal:
        if isinstance(entry, Skip) and run.step < entry.from_step + entry.num_steps:
            return False
        if isinstance(entry, Rebatch | Resize):
            last = entry.from_step
    tokens = (run.step - last) * size * run.config.data.seq_length
    return last <= run.step and tokens >= run.config.batch_controller.min_tokens


def check_controller(config: Config, layout: Layout) -> None:
    """Refuse batches that this layout cannot have.

    Raises:
        UserError: the first batch does not divide.
    """
    start, together = config.batch_controller.start, config.micro_batch_size * layout.data
    if start is None:
        return
    if config.parallel.schedule in ("interleaved", "zero_bubble"):
        together *= layout.pipeline
    if start % together:
        raise UserError(
            f"batch_controller.start {start} does not divide into micro-batches of {config.micro_batch_size} in this "
            f"layout: make it a multiple of {together}"
        )
