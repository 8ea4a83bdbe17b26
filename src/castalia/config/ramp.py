"""The batch size as a function of the step: smaller at first, where gradients agree and noise does not hurt.

    size:    start ──> start + increment ──> ... ──> training.batch_size
    samples: |─ each for batch_ramp_samples / number of increments ─|─ the rest of the run ...

Sizes grow by equal increments at equal distances in samples, each at the first step that begins beyond
its mark (as Megatron-LM's `--rampup-batch-size`; Narayanan et al. 2021). With `batch_controller` the run itself
decides when they grow, and the plan of steps begins with its first size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from castalia.config.schema import Config, TrainingConfig


class Level(NamedTuple):
    """From a step on, so many samples in each step; and the samples of all steps before it."""

    first_step: int
    first_sample: int
    size: int


def levels(training: TrainingConfig) -> tuple[Level, ...]:
    """The batch sizes of a run, in order; a single one without a ramp."""
    start, end, by = training.batch_ramp_start, training.batch_size, training.batch_ramp_increment
    if start is None or by is None or not training.batch_ramp_samples:
        return (Level(0, 0, end),)
    found, step, sample = [], 0, 0
    each = training.batch_ramp_samples / ((end - start) // by)
    for number, size in enumerate(range(start, end, by), 1):
        steps = max(-int(-(number * each - sample) // size), 0)  # until a step begins at or beyond the mark
        if steps:
            found.append(Level(step, sample, size))
        step, sample = step + steps, sample + steps * size
    return (*found, Level(step, sample, end))


def planned(config: Config) -> tuple[Level, ...]:
    """The batch sizes that hold until something is decided during the run."""
    start = config.batch_controller.start
    return levels(config.training) if start is None else (Level(0, 0, start),)


def batch_size(found: Sequence[Level], step: int) -> int:
    """Samples in a step, counted from 0."""
    return found[bisect_right(found, step, key=lambda level: level.first_step) - 1].size


def samples_before(found: Sequence[Level], step: int) -> int:
    """Samples in all steps before one."""
    level = found[bisect_right(found, step, key=lambda level: level.first_step) - 1]
    return level.first_sample + (step - level.first_step) * level.size


def steps_for(found: Sequence[Level], samples: int) -> int:
    """The fewest steps that hold so many samples."""
    level = found[max(bisect_right(found, samples - 1, key=lambda level: level.first_sample) - 1, 0)]
    return level.first_step + -(-max(samples - level.first_sample, 0) // level.size)


def run_samples(config: Config, steps: int) -> int:
    """Samples of the first `steps` steps of a run; where a controller decides on batches, the most that may be."""
    return samples_before(levels(config.training), steps)
