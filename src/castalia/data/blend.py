"""Weights of several data sets -> which of them each sample of the blend comes from.

    weights ──normalised──> shares w ──> n-th sample: the set furthest behind, w_i n - taken_i
                                    └──> how many samples to ask of each set

This is GPT-NeoX's order bit for bit (blend_tree.py has one without tables). After any number of
samples each set is within one sample of its share or nearly so, and none with a positive weight
is rounded to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from castalia.errors import UserError

_LANES, _RUN_UP, _PASSES = 1024, 64, 30  # stretches side by side, steps before each, passes over all


def blend_requests(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples to ask of each data set of a blend: its share and 0.5 % more, as in GPT-NeoX."""
    return [math.ceil(num_samples * weight * 1.005) for weight in _normalised(weights)]


def blend_index(weights: Sequence[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Which data set gives the n-th sample of a blend, and its how-manieth sample that is.

    Step n takes the data set that is furthest behind its share, w_i max(n, 1) - taken_i; of
    several, the first. In float64, as GPT-NeoX's helper.

    Returns:
        dataset_index uint8 [num_samples], dataset_sample_index int64 [num_samples].
    """
    shares = [float(share) for share in _normalised(weights)]
    if len(shares) > 255:
        raise UserError(f"a blend of {len(shares)} data sets was asked for: 255 is the most")
    which = _furthest_behind(np.array(shares), num_samples)
    sample = np.zeros(num_samples, np.int64)
    for i in range(len(shares)):
        mine = np.flatnonzero(which == i)
        sample[mine] = np.arange(len(mine))
    return which, sample


class TableBlend:
    """GPT-NeoX's blend as two tables, 9 bytes a sample; see `ComputedBlend` for the same methods without tables."""

    def __init__(self, weights: Sequence[float], num_samples: int) -> None:
        self.which, self.sample = blend_index(weights, num_samples)

    def __len__(self) -> int:
        return len(self.which)

    def at(self, n: int) -> tuple[int, int]:
        """The set of the n-th sample, and its how-manieth sample that is."""
        return int(self.which[n]), int(self.sample[n])

    def taken(self, k: int) -> int:
        """Samples that set `k` gives to the whole blend."""
        return int(np.count_nonzero(self.which == k))

    def numbers(self, k: int, samples: np.ndarray) -> np.ndarray:
        """Where in the blend the given samples of set `k` are: int64; those beyond left out."""
        mine: np.ndarray = np.flatnonzero(self.which == k)
        return np.asarray(mine[samples[samples < len(mine)]])


def _furthest_behind(shares: np.ndarray, num_samples: int) -> np.ndarray:
    """The choices of `blend_index`, uint8 [num_samples], many stretches of them at once.

    What is chosen from n on depends on what was taken before n alone. So the range is cut into
    stretches that numpy steps through side by side, each from a guess of what was taken by then:
    the shares rounded, and a run-up of some steps. A stretch whose beginning is not what the one
    before it ended with is done again from there, until none is left; then, by induction, every
    choice is that of a loop from 0 on, whatever the guesses were worth.
    """
    lanes = max(1, min(_LANES, num_samples // (2 * _RUN_UP)))
    length = -(-num_samples // lanes)
    first = np.arange(lanes, dtype=np.int64) * length
    before = np.maximum(first - _RUN_UP, 0)
    ideal = shares[:, None] * before
    begin = np.floor(ideal)
    # What rounding down left over goes to the largest remainders; each lane must have taken n by step n.
    rank = np.argsort(np.argsort(begin - ideal, axis=0, kind="stable"), axis=0)
    begin += rank < before - begin.sum(axis=0)
    _, begin = _step_through(shares, begin, before, _RUN_UP)
    begin[:, 0] = 0
    choices, end = _step_through(shares, begin, first, length)
    passes = 0
    while (wrong := 1 + np.flatnonzero((begin[:, 1:] != end[:, :-1]).any(axis=0))).size:
        passes += 1
        if passes > _PASSES:  # guesses do not help here: one stretch after the other, as the loop would
            wrong = wrong[:1]
        begin[:, wrong] = end[:, wrong - 1]
        choices[:, wrong], end[:, wrong] = _step_through(shares, begin[:, wrong], first[wrong], length)
    return choices.T.reshape(-1)[:num_samples].copy()


def _step_through(
    shares: np.ndarray, taken: np.ndarray, first: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choices of each lane from its step `first` on, uint8 [steps, lanes], and what it has taken in the end.

    Args:
        shares: float64 [K].
        taken: float64 [K, lanes], whole numbers, taken before `first`.
        first: int64 [lanes].
        steps: how many to go.
    """
    taken = taken.copy()
    choices = np.empty((steps, len(first)), np.uint8)
    lane, column = np.arange(len(first)), shares[:, None]
    for s in range(steps):
        choice = np.argmax(column * np.maximum(first + s, 1.0) - taken, axis=0)
        choices[s] = choice
        taken[choice, lane] += 1.0
    return choices, taken


def weights_by_num_documents(num_documents: Sequence[int], alpha: float, formula: str = "gptneox") -> list[float]:
    """Blend weights from document counts.

    With u_i = N_i / sum N the weight is p_i = u_i^alpha / sum u^alpha: `xlmr`, of Conneau et al., "Unsupervised
    Cross-lingual Representation Learning at Scale" (2020), section 3.1. `gptneox`, its `weight_by_num_documents`,
    has p_i (1 - u_i), normalised, by which a set that dominates gets less than a smaller one.
    """
    if len(num_documents) == 1:
        return [1.0]
    u = np.asarray(num_documents, np.float64)
    u = u / u.sum()
    p = u**alpha
    weights = p / p.sum()
    if formula == "gptneox":
        weights = weights * (1 - u)
        weights = weights / weights.sum()
    return [float(weight) for weight in weights]


def check_weights(weights: Sequence[float]) -> None:
    """Refuse what does not make a blend.

    Raises:
        UserError: there is no weight, a negative one, or none above 0.
    """
    _normalised(weights)


def _normalised(weights: Sequence[float]) -> np.ndarray:
    array = np.asarray(weights, np.float64)
    if array.size == 0 or not np.isfinite(array).all() or (array < 0).any() or array.sum() <= 0:
        raise UserError(f"the weights {list(weights)} do not make a blend: give numbers above 0, one for each data set")
    normalised: np.ndarray = array / array.sum()
    return normalised
