"""The gradient noise scale: from the norms of two means of gradients, a small and a big one, of the same step.

    |g_small|^2 at B_small ─┐  E |g_B|^2 = |G|^2 + tr(S) / B        signal |G|^2 ─┐
    |g_big|^2   at B_big   ─┴────── two equations, two unknowns ──> noise tr(S) ──┴──> tr(S) / |G|^2

McCandlish et al. 2018, "An empirical model of large-batch training", appendix A. Both estimates are unbiased, single
ones are very noisy, so means over many steps are divided. The interval is Fieller's, for a ratio of two means, which
says honestly when the signal cannot be told from zero yet. The scale is about the critical batch size: below it,
twice the batch saves almost half of the steps; far above, nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

_Z = 1.959963984540054  # of a normal distribution, 97.5%


class Estimate(NamedTuple):
    """What is known of the noise.

    Attributes:
        scale: noise / signal, in the unit of the batch sizes; None while the signal's mean is not positive.
        low, high: the 95% interval of the scale; None where it has no such bound.
        signal: |G|^2, mean over the window.
        noise: tr(S), mean over the window.
        measured: measurements in the window.
    """

    scale: float | None
    low: float | None
    high: float | None
    signal: float
    noise: float
    measured: int


class NoiseScale:
    """A window of measurements.

    Args:
        window: how many of the last ones count.
    """

    def __init__(self, window: int) -> None:
        self._pairs: deque[tuple[float, float]] = deque(maxlen=window)

    def add(self, small: float, small_size: float, big: float, big_size: float) -> None:
        """Take one step's measurement.

        Args:
            small: squared norm of a mean gradient of `small_size` samples (or tokens), itself a mean over as many
                such means as there are.
            big: the same of `big_size`; sizes in one unit, `big_size` the larger.
        """
        if not (math.isfinite(small) and math.isfinite(big)) or small_size >= big_size:
            return
        signal = (big_size * big - small_size * small) / (big_size - small_size)
        noise = (small - big) / (1 / small_size - 1 / big_size)
        self._pairs.append((noise, signal))

    def estimate(self) -> Estimate | None:
        """What the window says; None with fewer than two measurements."""
        n = len(self._pairs)
        if n < 2:
            return None
        noise, signal = (math.fsum(p[i] for p in self._pairs) / n for i in (0, 1))
        # Variances and covariance of the two means.
        spread = n * (n - 1)
        v_noise = math.fsum((a - noise) ** 2 for a, _ in self._pairs) / spread
        v_signal = math.fsum((b - signal) ** 2 for _, b in self._pairs) / spread
        both = math.fsum((a - noise) * (b - signal) for a, b in self._pairs) / spread
        t = student(n - 1) ** 2
        low, high = fieller(noise, signal, t * v_noise, t * v_signal, t * both)
        return Estimate(noise / signal if signal > 0 else None, low, high, signal, noise, n)

    def state(self) -> list[list[float]]:
        """The window, as plain data for a checkpoint."""
        return [list(pair) for pair in self._pairs]

    def restore(self, state: Iterable[Any]) -> None:
        """Take a window that `state` gave."""
        self._pairs.clear()
        self._pairs.extend((float(a), float(b)) for a, b in state)


def student(degrees: int) -> float:
    """The 97.5% quantile of Student's t, by the Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5)."""
    z, v = _Z, degrees
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def fieller(a: float, b: float, va: float, vb: float, c: float) -> tuple[float | None, float | None]:
    """The ratios a / b that the errors of both allow, where b > 0 (Fieller 1954); negative ones are left out.

    Args:
        a, b: the two means.
        va, vb, c: their variances and covariance, times the square of the quantile.
    """
    square, middle, constant = b * b - vb, a * b - c, a * a - va
    inner = middle * middle - square * constant
    if square <= 0 or b <= 0:  # b may be zero: no upper bound, and a lower one only where a is surely positive
        if inner < 0 or square == 0:
            return None, None
        roots = sorted(((middle - math.sqrt(inner)) / square, (middle + math.sqrt(inner)) / square))
        return (roots[1] if roots[1] > 0 and a > 0 else None), None
    root = math.sqrt(max(inner, 0.0))
    return max((middle - root) / square, 0.0), max((middle + root) / square, 0.0)
