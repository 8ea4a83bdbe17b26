"""Blends: GPT-NeoX's order against its golden values and a slow loop; shares are kept to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data import blend as blend_module
from castalia.data.blend import blend_index, blend_requests, weights_by_num_documents
from castalia.errors import UserError

QUICK = settings(deadline=None, max_examples=100, derandomize=True)


def test_golden_blend() -> None:
    which, sample = blend_index([1, 2, 5], 24)
    assert which.tolist() == [2, 1, 0, 2, 2, 1, 2, 2, 0, 2, 1, 2, 2, 1, 2, 2, 0, 2, 1, 2, 2, 1, 2, 2]
    for i in range(3):
        assert sample[which == i].tolist() == list(range((which == i).sum()))
    assert blend_requests([1.0], 143000 * 1024) == [147164160]  # Pythia's, as its index files are named
    assert weights_by_num_documents([100, 1000, 10000], 0.3) == [
        0.30958594962596214,
        0.5671656639253285,
        0.12324838644870927,
    ]
    assert weights_by_num_documents([5], 0.3) == [1.0]


@QUICK
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), number=st.integers(1, 200))
def test_blend_stays_near_its_weights_and_within_its_requests(weights: list[float], number: int) -> None:
    which, _ = blend_index(weights, number)
    requests = blend_requests(weights, number)
    for i, weight in enumerate(weights):
        count = int((which == i).sum())
        assert abs(count - number * weight / sum(weights)) <= len(weights)
        assert count <= requests[i] + len(weights)


def slow_blend(weights: list[float], number: int) -> list[int]:
    """The definition, one sample after the other."""
    shares = [float(share) for share in np.array(weights, np.float64) / np.sum(np.array(weights, np.float64))]
    taken, which = [0] * len(shares), []
    for n in range(number):
        behind = [share * float(max(n, 1)) - count for share, count in zip(shares, taken, strict=True)]
        which.append(behind.index(max(behind)))
        taken[which[-1]] += 1
    return which


@QUICK
@given(
    weights=st.lists(st.one_of(st.floats(1e-4, 10), st.integers(0, 9)), min_size=1, max_size=9).filter(any),
    number=st.integers(0, 4000),
)
def test_blend_agrees_with_a_slow_loop(weights: list[float], number: int) -> None:
    which, sample = blend_index(weights, number)
    assert which.tolist() == slow_blend(weights, number)
    for i in range(len(weights)):
        assert sample[which == i].tolist() == list(range(int((which == i).sum())))


@pytest.mark.parametrize("run_up", [1, 16])
def test_blend_agrees_where_guesses_do_not_help(monkeypatch: pytest.MonkeyPatch, run_up: int) -> None:
    """Without a run-up or passes over all stretches, every wrong one is done again by itself."""
    monkeypatch.setattr(blend_module, "_PASSES", 0)
    monkeypatch.setattr(blend_module, "_RUN_UP", run_up)
    weights = [float(10.0 ** (-5 * x)) for x in np.random.RandomState(3).rand(20)]
    assert blend_index(weights, 3000)[0].tolist() == slow_blend(weights, 3000)


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2], [float("nan")]])
def test_blend_refuses_nonsense(weights: list[float]) -> None:
    with pytest.raises(UserError, match="do not make a blend"):
        blend_index(weights, 3)


def test_weights_by_documents_as_xlmr_has_them() -> None:
    weights = weights_by_num_documents([100, 1000, 10000], 0.5, "xlmr")
    assert np.allclose(np.array(weights) / weights[0], [1, 10**0.5, 10]) and np.isclose(sum(weights), 1)
    assert np.allclose(weights_by_num_documents([3, 5], 0.0, "xlmr"), 0.5)
