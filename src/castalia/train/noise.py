"""The gradient noise scale of a run (logging.noise_scale): where the two norms come from, and what is recorded.

    first micro-batch of each data-parallel rank ──its gradient's squares──> small ─┐
    whole batch ──the norm that is clipped by, or its squares──────────────> big ───┴─> noise_scale, low, high

No extra pass: the accumulated gradient is looked at once, after the first micro-batch, before any other joins it.
Where ZeRO sums gradients over ranks at once, that is the first micro-batch of all of them; a pipeline, whose
micro-batches overlap, gives each data-parallel rank's whole share. Squares come by parameter, and each group of
logging.noise_scale_groups sums its own. Sizes are valid tokens; the record is in sequences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from castalia.config import Config, LoggingConfig
from castalia.errors import UserError
from castalia.model.size import parameter_shapes
from castalia.optim import WeightStore
from castalia.optim.noise import Estimate, NoiseScale
from castalia.parallel.layout import Layout
from castalia.train.engine import StepStats


class NoiseMeter:
    """Takes steps, gives records.

    Args:
        cfg: says what is measured.
    """

    def __init__(self, cfg: LoggingConfig) -> None:
        self.wanted, self._patterns, self._window = cfg.noise_scale, cfg.noise_scale_groups, cfg.noise_scale_window
        self._scale = NoiseScale(self._window)
        self._groups: dict[str, NoiseScale] = {}
        self._big: dict[str, float] = {}
        self._tokens = self._samples = 0

    def before_update(self, store: WeightStore) -> None:
        """Look at the whole batch's gradients, which the update may use up, where groups are asked for."""
        if self._patterns:
            self._big = grouped(store.squares(), self._patterns)

    def add(self, stats: StepStats, grad_norm: float, samples: int) -> None:
        """Take a step of so many sequences."""
        if not self.wanted or stats.small is None:
            return
        self._tokens, self._samples = self._tokens + stats.tokens, self._samples + samples
        squares, tokens = stats.small
        self._scale.add(sum(squares.values()), tokens, grad_norm**2, stats.tokens)
        for group, small in grouped(squares, self._patterns).items():
            scale = self._groups.setdefault(group, NoiseScale(self._window))
            scale.add(small, tokens, self._big[group], stats.tokens)

    def in_sequences(self) -> dict[str, float | None]:
        """The scale (`value`) and the ends of its interval (`low`, `high`); empty where nothing is measured yet."""
        return self._ends(self._scale.estimate())

    def record(self) -> dict[str, Any]:
        """What a training record says."""
        return {f"noise_scale{'' if k == 'value' else f'_{k}'}": v for k, v in self.in_sequences().items()}

    def by_group(self) -> dict[str, dict[str, float | None]]:
        """What a record of the groups says: of each as `in_sequences`; empty where there are none."""
        found = {group: self._ends(scale.estimate()) for group, scale in self._groups.items()}
        return {group: values for group, values in found.items() if values}

    def _ends(self, found: Estimate | None) -> dict[str, float | None]:
        if found is None:
            return {}
        per_sequence = self._tokens / max(self._samples, 1)
        values = {"value": found.scale, "low": found.low, "high": found.high}
        return {name: None if value is None else value / per_sequence for name, value in values.items()}

    def advice(self, batch: int) -> str | None:
        """What the window means for a batch of so many sequences; None where nothing is known."""
        found = self.in_sequences()
        scale, low, high = (found.get(key) for key in ("value", "low", "high"))
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
        groups = {group: scale.state() for group, scale in self._groups.items()}
        counted = {"tokens": self._tokens, "samples": self._samples}
        return {"pairs": self._scale.state(), **counted, "patterns": self._patterns, "groups": groups}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint, which may know of none, or of other groups, which are forgotten."""
        self._groups.clear()
        if self.wanted and state:
            self._scale.restore(state["pairs"])
            self._tokens, self._samples = state["tokens"], state["samples"]
            for group, pairs in state["groups"].items() if state.get("patterns") == self._patterns else ():
                self._groups[group] = NoiseScale(self._window)
                self._groups[group].restore(pairs)


def grouped(squares: Mapping[str, float], patterns: Sequence[str]) -> dict[str, float]:
    """Sums over parameters in whose names the first pattern that matches finds the same text, by that text."""
    out: dict[str, float] = {}
    for name, square in squares.items():
        found = next((match for pattern in patterns if (match := re.search(pattern, name))), None)
        if found is not None:
            out[found[0]] = out.get(found[0], 0.0) + square
    return out


def check_noise(config: Config, layout: Layout) -> None:
    """Refuse what cannot be measured, before the run begins.

    Raises:
        UserError: nothing smaller than the batch can be seen in this layout, or a group has no parameters.
    """
    if not config.logging.noise_scale:
        return
    if layout.context > 1 or layout.expert > 1:
        raise UserError("logging.noise_scale needs whole gradients of a rank's own sequences: leave it out here")
    shared = config.model.tie_embeddings or config.model.position == "rpe"
    if layout.pipeline > 1 and (shared or layout.zero):
        what = "ZeRO" if layout.zero else "weights that several stages share"
        raise UserError(f"logging.noise_scale does not go together with {what} in a pipeline: leave it out here")
    batch = config.batch_controller.start or config.training.batch_size
    micro = batch // (config.micro_batch_size * layout.data)
    seen = layout.data if layout.pipeline > 1 else micro if layout.zero else micro * layout.data
    if seen == 1:
        raise UserError(
            "logging.noise_scale compares a part of the batch with the whole, and here the whole goes through at once: "
            "lower training.micro_batch_size, or leave it out"
        )
    _check_groups(config)


def _check_groups(config: Config) -> None:
    names = list(parameter_shapes(config.model, config.model.vocab_size or 1))
    trained = [n for n in names if n == "soft_prompt.weight"] if config.model.soft_prompt_tokens else names
    for pattern in config.logging.noise_scale_groups:
        try:
            fits = [name for name in trained if re.search(pattern, name)]
        except re.error as error:
            raise UserError(
                f"logging.noise_scale_groups: '{pattern}' is no regular expression ({error}): mend it"
            ) from None
        if not fits:
            raise UserError(
                f"logging.noise_scale_groups: '{pattern}' matches none of the parameters that are trained "
                f"({trained[0]}, ...): correct or remove it"
            )
