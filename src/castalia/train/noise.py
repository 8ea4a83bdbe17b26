"""The gradient noise scale of a run (logging.noise_scale): where the two norms come from, and what is recorded.

    first micro-batch of each data-parallel rank ──its gradient's norm──> small ─┐
    whole batch ──the norm that is clipped by──────────────────────────> big ───┴─> noise_scale, low, high

No extra pass: the accumulated gradient is looked at once, after the first micro-batch, before any other joins it.
Where ZeRO sums gradients over ranks at once, that is the first micro-batch of all of them; a pipeline, whose
micro-batches overlap, gives each data-parallel rank's whole share. Sizes are valid tokens; the
record is in sequences.
"""

from __future__ import annotations

from typing import Any

from castalia.config import Config
from castalia.errors import UserError
from castalia.optim.noise import NoiseScale
from castalia.parallel.layout import Layout
from castalia.train.engine import StepStats


class NoiseMeter:
    """Takes steps, gives records.

    Args:
        config: complete.
        layout: of the ranks.

    Raises:
        UserError: nothing smaller than the batch can be seen in this layout.
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        self.wanted = config.logging.noise_scale
        self._scale = NoiseScale(config.logging.noise_scale_window)
        self._tokens = self._samples = 0
        if self.wanted:
            _check(config, layout)

    def add(self, stats: StepStats, grad_norm: float, samples: int) -> None:
        """Take a step of so many sequences."""
        if self.wanted and stats.small is not None:
            self._tokens, self._samples = self._tokens + stats.tokens, self._samples + samples
            self._scale.add(*stats.small, grad_norm**2, stats.tokens)

    def record(self) -> dict[str, Any]:
        """What a training record says; empty where nothing is measured yet."""
        found = self._scale.estimate() if self.wanted else None
        if found is None:
            return {}
        per_sequence = self._tokens / max(self._samples, 1)
        values = {"noise_scale": found.scale, "noise_scale_low": found.low, "noise_scale_high": found.high}
        return {name: None if value is None else value / per_sequence for name, value in values.items()}

    def advice(self, batch: int) -> str | None:
        """What the window means for a batch of so many sequences; None where nothing is known."""
        found = self.record()
        scale, low, high = (found.get(f"noise_scale{end}") for end in ("", "_low", "_high"))
        if scale is None:
            return None
        between = f"{low:.3g} to {high:.3g}" if low is not None and high is not None else "not bounded yet"
        if low is not None and batch < low:
            verdict = "a larger batch would save steps almost in proportion"
        elif high is not None and batch > high:
            verdict = "a smaller batch would learn as much from fewer tokens"
        else:
            verdict = "the batch is about right, or the window too short to tell"
        return (
            f"gradient noise: the critical batch size is about {scale:.3g} sequences (95%: {between}) "
            f"by the last steps; with {batch}, {verdict}"
        )

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint."""
        if not self.wanted:
            return None
        return {"pairs": self._scale.state(), "tokens": self._tokens, "samples": self._samples}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint, which may know of none."""
        if self.wanted and state:
            self._scale.restore(state["pairs"])
            self._tokens, self._samples = state["tokens"], state["samples"]


def _check(config: Config, layout: Layout) -> None:
    micro = config.training.batch_size // (config.micro_batch_size * layout.data)
    if layout.context > 1 or layout.expert > 1:
        raise UserError("logging.noise_scale needs whole gradients of a rank's own sequences: leave it out here")
    if layout.pipeline > 1 and (config.model.tie_embeddings or layout.zero):
        what = "ZeRO" if layout.zero else "tied embeddings"
        raise UserError(f"logging.noise_scale does not go together with {what} in a pipeline: leave it out here")
    seen = layout.data if layout.pipeline > 1 else micro if layout.zero else micro * layout.data
    if seen == 1:
        raise UserError(
            "logging.noise_scale compares a part of the batch with the whole, and here the whole goes through at once: "
            "lower training.micro_batch_size, or leave it out"
        )
