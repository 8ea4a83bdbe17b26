"""The blend that is computed: its two directions, its deviation from the shares, and sources of next to no weight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data.blend_tree import ComputedBlend
from castalia.errors import UserError

WEIGHTS = st.lists(
    st.one_of(st.integers(0, 4), st.floats(0, 1), st.floats(1e-9, 1e-2), st.just(1 / 3)), min_size=1, max_size=9
).filter(lambda weights: sum(weights) > 0)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(WEIGHTS, st.integers(0, 250))
def test_two_directions_and_shares(weights: list[float], num_samples: int) -> None:
    blend, total = ComputedBlend(weights, num_samples), sum(weights)
    used = sum(weight > 0 for weight in weights)
    most = {1: 1e-9, 2: 0.5 + 1e-9, 3: 1.0}.get(used, 1.68)
    counts, where = [0] * len(weights), [[] for _ in weights]
    for n in range(num_samples):
        k, j = blend.at(n)
        assert j == counts[k]
        counts[k] += 1
        where[k].append(n)
        assert all(abs(c - w / total * (n + 1)) <= most for c, w in zip(counts, weights, strict=True))
    for k, numbers in enumerate(where):
        assert blend.taken(k) == len(numbers)
        assert blend.numbers(k, np.arange(len(numbers) + 3)).tolist() == numbers
    assert len(blend) == num_samples and not any(c for c, w in zip(counts, weights, strict=True) if w == 0)


def test_a_long_run_in_no_memory() -> None:
    """10^15 samples: the counts are exact to a sample or two, however small a share."""
    weights = [0.6, 0.3, 0.1 - 1e-12, 1e-12]
    blend = ComputedBlend(weights, 10**15)
    taken = [blend.taken(k) for k in range(4)]
    assert sum(taken) == 10**15
    assert all(abs(t - w / sum(weights) * 10**15) < 3 for t, w in zip(taken, weights, strict=True))
    n = 987_654_321_012_345
    k, j = blend.at(n)
    assert blend.numbers(k, np.array([j])).tolist() == [n]


def test_every_source_is_read_once_its_share_is_a_few_samples() -> None:
    """Within 1.68 of a share of 2 is more than none."""
    weights = [1000.0, *range(1, 40)]
    blend = ComputedBlend(weights, int(2 * sum(weights)))
    assert min(blend.taken(k) for k in range(40)) >= 1
    with pytest.raises(UserError, match="do not make a blend"):
        ComputedBlend([1, -1], 3)
