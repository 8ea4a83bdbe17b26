"""The length of a step's sequences as a function of the step: shorter at first, full later on.

    n-th step ─┬─ linear, root:  start + (end - start) (n / steps)^(1 / root), down to a multiple ─┬─> min(., end)
               └─ discrete:      lengths[i] of the first until[i] >= n, or the last ───────────────┘

These are the schedules of DeepSpeed's curriculum learning (fixed_linear, fixed_root,
fixed_discrete), which GPT-NeoX's `curriculum_learning` takes, n from 1 on. Li, Zhang and He,
"The Stability-Efficiency Dilemma" (2022), say what a curriculum is good for. Rounding down comes
after the rise, so an end that is no multiple is reached a little after `steps`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import partial

from castalia.config.ramp import run_samples
from castalia.config.schema import Config, DataConfig


def sequence_length(data: DataConfig, step: int) -> int:
    """Tokens of each sequence of optimizer step `step`, counted from 0: 1 to data.seq_length."""
    n = step + 1
    if data.curriculum == "none":
        return data.seq_length
    if data.curriculum == "discrete":
        lengths, until = data.curriculum_lengths or [data.seq_length], data.curriculum_until or []
        return min(lengths[sum(n > edge for edge in until)], data.seq_length)
    end = data.curriculum_end or data.seq_length
    root = data.curriculum_root if data.curriculum == "root" else 1
    share: float = (n / (data.curriculum_steps or 1)) ** (1 / root)
    length = math.floor(share * (end - data.curriculum_start) + data.curriculum_start)
    return min(length - length % data.curriculum_multiple, end, data.seq_length)


def row_tokens(data: DataConfig, steps: int) -> int:
    """Tokens that one row of the batch reads in the first `steps` steps."""
    if steps < 1:
        return 0
    length = partial(sequence_length, data)
    last = length(steps - 1)
    settled = bisect_left(range(steps), last, key=length)  # lengths never fall
    return sum(map(length, range(settled))) + (steps - settled) * last


def trained_tokens(config: Config, steps: int) -> int:
    """Tokens that the batches of the first `steps` steps read."""
    if config.data.curriculum == "none":
        return run_samples(config, steps) * config.data.seq_length
    return config.training.batch_size * row_tokens(config.data, steps)
