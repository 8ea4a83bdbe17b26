"""What ranks saw and hold -> how far a layout is from one process, and which parameter differs first.

Every rank's every part is compared with its rectangle of the whole, so copies that drift apart are found
too. Differences are relative to the largest number of a parameter: a small one beside it may be rounding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Part = tuple[np.ndarray, tuple[int, ...]]
"""A rectangle of a tensor, and where it begins."""


class Seen(NamedTuple):
    """What one rank saw of a module in the first step: fp32 `[samples, tokens, h]`.

    Attributes:
        output: of the forward pass.
        gradient: of the loss with respect to that; None where none came back.
        tokens: their numbers in the sequence.
    """

    output: np.ndarray
    gradient: np.ndarray | None
    tokens: np.ndarray


@dataclass
class Trace:
    """What one rank saw and holds.

    Attributes:
        losses, norms: of each step.
        gradients: of the first step, by parameter.
        weights: after the last step.
        shapes: of the whole parameters.
        samples: numbers of the samples that it read, of each step.
        modules: where they were watched, in the order of the forward pass.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Part] = field(default_factory=dict)
    weights: dict[str, Part] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    samples: list[list[int]] = field(default_factory=list)
    modules: dict[str, Seen] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """How far a layout is from one process.

    Attributes:
        layout, processes: which.
        loss, norm, gradient, weight: largest relative differences.
        first: the first parameter, in the order of the forward pass, beyond the tolerance; None if none is.
        tolerance: what is allowed.
        guilty: the module that makes the difference, or another part of the step; None where it was not looked for.
    """

    layout: str
    processes: int
    loss: float
    norm: float
    gradient: float
    weight: float
    first: str | None
    tolerance: float
    guilty: str | None = None

    @property
    def good(self) -> bool:
        """Whether all differences are within the tolerance."""
        return all(x <= self.tolerance for x in (self.loss, self.norm, self.gradient, self.weight))


def compare(name: str, expected: Trace, traces: Sequence[Trace], tolerance: float) -> Verdict:
    """Hold what every rank saw and holds against one process."""
    loss = max(relative(t.losses, expected.losses) for t in traces)
    norm = max(relative(t.norms, expected.norms) for t in traces)
    worst = {"gradients": 0.0, "weights": 0.0}
    first = None
    for kind in worst:
        apart = differences(kind, expected, traces)
        worst[kind] = max(apart.values(), default=0.0)
        beyond = [parameter for parameter, difference in apart.items() if difference > tolerance]
        if beyond and first is None:
            first = f"{beyond[0]} ({kind})"
    return Verdict(name, len(traces), loss, norm, worst["gradients"], worst["weights"], first, tolerance)


def differences(kind: str, expected: Trace, traces: Sequence[Trace]) -> dict[str, float]:
    """How far each parameter is from one process's, in the order of the forward pass; infinite where a part is missing.

    Args:
        kind: `gradients` or `weights`.
    """
    whole: dict[str, Part] = getattr(expected, kind)
    everything = max((np.abs(value).max() for value, _ in whole.values()), default=0.0)
    out = {}
    for parameter in sorted(whole, key=_depth):
        reference = whole[parameter][0]
        scale = max(float(np.abs(reference).max()), 1e-3 * float(everything))
        seen = np.zeros(reference.shape, bool)
        difference = 0.0
        for trace in traces:
            if parameter not in getattr(trace, kind):
                continue
            value, offset = getattr(trace, kind)[parameter]
            region = tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))
            seen[region] = True
            if value.size:
                difference = max(difference, finite(float(np.abs(value - reference[region]).max()) / scale))
        out[parameter] = difference if seen.all() else np.inf
    return out


def relative(values: Sequence[float], references: Sequence[float]) -> float:
    """The largest relative difference of numbers; infinite where one is none."""
    value, reference = np.array(values), np.array(references)
    return finite(float((np.abs(value - reference) / np.maximum(np.abs(reference), 1e-12)).max()))


def finite(difference: float) -> float:
    """Infinite for what is no number, so that it is beyond every tolerance."""
    return difference if np.isfinite(difference) else np.inf


def _depth(name: str) -> tuple[int, int, str]:
    """Where a parameter is met in a forward pass."""
    layer = re.match(r"layers\.(\d+)\.", name)
    if layer:
        order = ("attention_norm", "attention.qkv", "attention.qk_norm", "attention", "mlp_norm", "mlp.up", "mlp")
        rest = name[layer.end() :]
        place = next((i for i, part in enumerate(order) if rest.startswith(part)), len(order))
        return 1 + int(layer[1]), place, name
    return (0 if "embedding" in name or name.startswith(("relative", "soft")) else 1 << 30), 0, name
