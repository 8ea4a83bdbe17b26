"""Paired significance: exact where arithmetic knows the answer, and blind to what both models share."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from castalia.errors import UserError
from castalia.evaluate.compare import compare, paired_items, sign_test


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 5), (1, 9), (30, 10), (0, 1)])
def test_the_sign_test_is_the_binomial(wins, losses):
    n = wins + losses
    expected = min(1.0, 2 * sum(comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n)
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_the_sign_test_of_many_items_is_a_number():
    assert 0 < sign_test(5100, 4900) < 0.1


def test_a_small_steady_difference_is_found_below_large_noise():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=300) * 10
    a, b = shared + 0.1, shared + rng.normal(size=300) * 0.1
    found = compare(list(a), list(b), draws=2000)
    assert found.low < found.difference < found.high
    assert found.low > 0 and found.p_bootstrap < 0.01
    # Not paired, nothing would be seen: the noise of the means is six times the difference.
    assert abs(found.difference) < shared.std() / 300**0.5


def test_no_difference_is_not_found():
    rng = np.random.default_rng(1)
    a = rng.integers(0, 2, 200)
    b = rng.permutation(a)
    found = compare(list(a), list(b), draws=2000)
    assert found.difference == 0 and found.p_bootstrap > 0.5 and found.p_sign == pytest.approx(1, abs=0.1)


def test_weights_are_of_the_mean():
    found = compare([1, 0], [0, 0], weights=[3, 1], draws=100)
    assert (found.a, found.b, found.difference) == (0.75, 0, 0.75)


def test_other_items_are_refused():
    with pytest.raises(UserError, match="use the same ones"):
        compare([1, 2], [1])
    ours, theirs = ([{"doc_id": 0, "doc_hash": h, "acc": 1.0}] for h in "ab")
    with pytest.raises(UserError, match="different documents"):
        paired_items(ours, theirs, ["acc"])


def test_items_are_paired_by_document():
    ours = [{"doc_id": i, "doc_hash": i, "acc": float(i), "text": "x"} for i in range(3)]
    theirs = [{"doc_id": i, "doc_hash": i, "acc": 0.0, "text": "x"} for i in (2, 1)]
    assert paired_items(ours, theirs, ["acc", "text"]) == {"acc": ([1.0, 2.0], [0.0, 0.0])}
