"""Spikes: noticed before the weights move, stepped around, and written down with the documents concerned.

    loss, gradient norm ──median and MAD of the last accepted steps──> fine, or a spike
                                                                          │ guard.spikes
         skip: the next batch in place of this one, from here on  <───────┼───────> rollback: the same from a
         (the weights have not moved)                                     v         checkpoint before the suspects
                                                         incidents/step-N.json, the journal

What is left out becomes an entry of the journal, so the run is the same, bit by bit, as one whose journal
had that entry from the start: it never saw those batches. Every rank judges the same numbers.
"""

from __future__ import annotations

import json
import math
from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Any

from castalia.checkpoint import find_checkpoint, load_checkpoint
from castalia.checkpoint.layout import problems_of, step_name, step_of, write_durably
from castalia.config.schema_guard import GuardConfig
from castalia.data.plan import Amendment, Skip, StepSpec
from castalia.errors import UserError
from castalia.train.engine import StepStats

if TYPE_CHECKING:
    from castalia.train.run import Run

_NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_LEAST = 0.02  # of a deviation, nats or the log of a norm: less is no jump, however still a run is


class Spiked(UserError):
    """There were more spikes than guard.budget allows."""


class Guard:
    """The judge of one run.

    Args:
        cfg: the section.
    """

    def __init__(self, cfg: GuardConfig) -> None:
        self._cfg = cfg
        self._seen: deque[tuple[float, float]] = deque(maxlen=cfg.window)

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, in words; None: nothing, and the step counts from now on."""
        if self._cfg.spikes == "none":
            return None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss} and gradient norm {grad_norm} are not finite"
        values = (loss, math.log(max(grad_norm, 1e-30)))
        if len(self._seen) >= self._cfg.window // 2:
            for name, shown, value, past in zip(
                ("loss", "gradient norm"), (loss, grad_norm), values, zip(*self._seen, strict=True), strict=True
            ):
                middle = median(past)
                deviation = max(_NORMAL * median(abs(p - middle) for p in past), _LEAST)
                if value > middle + self._cfg.threshold * deviation:
                    usual = middle if name == "loss" else math.exp(middle)
                    far = (value - middle) / deviation
                    return f"{name} {shown:.4g} is {far:.0f} deviations above its median {usual:.4g}"
        self._seen.append(values)
        return None

    def state(self) -> list[list[float]]:
        """The accepted steps' numbers, as plain data for a checkpoint."""
        return [list(pair) for pair in self._seen]

    def restore(self, state: Any) -> None:
        """Go on from a checkpoint, which may know of none."""
        self._seen.clear()
        self._seen.extend((float(a), float(b)) for a, b in state or ())


def step_around(run: Run, spec: StepSpec, stats: StepStats, grad_norm: float, why: str) -> None:
    """Leave this step's batch out, and with rollback those before it; write down what was in them.

    Raises:
        Spiked: the budget is used up.
    """
    cfg, suspect = run.config.guard, [spec]
    run.store.discard()
    back = None
    if cfg.spikes == "rollback":
        earliest = max(spec.step - cfg.lookback, 0)
        run.saving.settle()
        back = run.mesh.from_first(_checkpoint_before(run, earliest) if run.first else None)
        if back is not None:
            suspect = [run.loader.plan.at(step) for step in range(earliest, spec.step + 1)]
    used = sum(entry.num_steps for entry in run.journal if isinstance(entry, Skip))
    action = f"went back to step {back}" if back is not None else "the weights have not moved"
    _write_incident(run, suspect, stats, grad_norm, why, action)
    if used + len(suspect) > cfg.budget:
        raise Spiked(
            f"step {spec.step + 1}: {why}, and {used} steps were left out before of the {cfg.budget} that guard.budget "
            f"allows; {_saved(run)}: lower optimizer.lr, look at {_incidents(run)}, or raise guard.budget"
        )
    if back is not None:
        _go_back(run, back)
    run.replan(left_out(run.journal, suspect[0].step, len(suspect), why))
    run.metrics.write("event", run.step, event="spike", text=f"step {spec.step + 1}: {why}; {action}")
    run.console.say(
        f"WARNING: step {spec.step + 1}: {why}; {action}; {len(suspect)} batch(es) are left out, see {_incidents(run)}"
    )


def left_out(journal: tuple[Amendment, ...], step: int, count: int, why: str) -> tuple[Amendment, ...]:
    """A journal that also leaves out the batches of `count` steps from one on.

    What was left out between these steps is left out from the first of them on: later, it would move by as many
    batches as are left out now, and meet others.
    """
    between = [entry for entry in journal if isinstance(entry, Skip) and step < entry.from_step < step + count]
    reasons = dict.fromkeys((*(entry.reason for entry in between), why))
    skip = Skip(step, count + sum(entry.num_steps for entry in between), "; ".join(reasons))
    return (*(entry for entry in journal if entry not in between), skip)


def _checkpoint_before(run: Run, step: int) -> int | None:
    """The newest whole checkpoint with at most so many steps done."""
    found = [step_of(path.name) for path in run.checkpoints.glob("step-*")] if run.checkpoints.is_dir() else []
    for at in sorted((s for s in found if s is not None and s <= step), reverse=True):
        if not problems_of(run.checkpoints / step_name(at)):
            return at
    return None


def _go_back(run: Run, step: int) -> None:
    """The run as it was at a checkpoint of its own; what came later is set aside."""
    from castalia.train.resume import set_aside, take_state

    found = find_checkpoint(run.checkpoints, step)
    assert found is not None, "it was found whole a moment ago"
    load_checkpoint(found.path, run.store.tensors())
    state = found.state
    take_state(run, state)
    # The journal stays: it holds all that the checkpoint's does, and entries for steps that will be run again.
    if run.first:
        set_aside(run, step)
    run.rewind()


def _write_incident(
    run: Run, suspect: list[StepSpec], stats: StepStats, grad_norm: float, why: str, action: str
) -> None:
    if not run.first:
        return
    batches = []
    for spec in suspect:
        samples = []
        for number in range(spec.first_sample, spec.first_sample + spec.num_samples):
            pieces = run.data.datasets["train"].pieces(number)
            documents = [
                {"data": p.prefix, "document": int(p.sequence), "offset": int(p.offset), "length": int(p.length)}
                for p in pieces
            ]
            samples.append({"sample": number, "documents": documents})
        batches.append({"step": spec.step + 1, "samples": samples})
    content = {
        "step": suspect[-1].step + 1,
        "why": why,
        "action": action,
        "loss": stats.loss if math.isfinite(stats.loss) else str(stats.loss),
        "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
        "left_out": batches,
    }
    folder = run.directory / "incidents"
    folder.mkdir(exist_ok=True)
    number, base = 1, f"step-{suspect[-1].step + 1:08d}"
    while (folder / f"{base}-{number}.json").exists():
        number += 1
    write_durably(folder / f"{base}-{number}.json", (json.dumps(content, indent=1) + "\n").encode())


def _incidents(run: Run) -> str:
    return str(run.directory / "incidents")


def _saved(run: Run) -> str:
    return f"the newest checkpoint is {run.saved}" if run.saved else "no checkpoint was written yet"
