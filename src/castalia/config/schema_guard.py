"""The section `guard`: what happens where the loss or the gradient jumps."""

from __future__ import annotations

from typing import Literal

from castalia.config.section import Section, setting


class GuardConfig(Section):
    """Spikes of loss or gradient: noticed before the update, and stepped around."""

    spikes: Literal["none", "skip", "rollback"] = setting(
        "none",
        "where loss or gradient norm jumps or is not a number: skip goes on with the next batch, rollback goes back "
        "to a checkpoint before guard.lookback and leaves those batches out too",
    )
    threshold: float = setting(
        10.0, "robust standard deviations above the median from which on a value is a spike", gt=1
    )
    window: int = setting(100, "accepted steps whose median and deviation count; half of them first", "numerics", ge=8)
    lookback: int = setting(2, "rollback only: steps before the spike that are suspect too", unit="steps", ge=0)
    budget: int = setting(
        20, "steps whose batches may be left out in the whole run; their samples are laid out beforehand", ge=1
    )
