"""The computed order: a permutation for every size, the inverse of itself, and no token left out."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data.order_permutation import Permutation, PermutationOrder
from castalia.errors import UserError

QUICK = settings(deadline=None, max_examples=100, derandomize=True)


@QUICK
@given(n=st.one_of(st.integers(1, 40), st.integers(1, 3000)), key=st.text(max_size=9))
def test_it_is_a_permutation_and_has_an_inverse(n: int, key: str) -> None:
    permutation = Permutation(n, key)
    images = permutation.map(np.arange(n))
    assert sorted(images.tolist()) == list(range(n))
    assert np.array_equal(permutation.inverse_map(images), np.arange(n))
    x = n // 2
    assert permutation(x) == images[x] and permutation.inverse(int(images[x])) == x


@QUICK
@given(n=st.integers(1, 2**62), data=st.data())
def test_the_inverse_of_large_permutations(n: int, data: st.DataObject) -> None:
    permutation = Permutation(n, "key")
    x = data.draw(st.integers(0, n - 1))
    y = permutation(x)
    assert 0 <= y < n and permutation.inverse(y) == x
    assert permutation.map(np.array([x])).tolist() == [y]


@pytest.mark.parametrize("n", [2, 3, 5, 12, 97])
def test_every_number_goes_everywhere_equally_often(n: int) -> None:
    """Chi-squared of where 0 and n - 1 go, over 4000 keys; beyond 5 standard deviations by chance about never."""
    for x in (0, n - 1):
        counts = np.bincount([Permutation(n, str(k))(x) for k in range(4000)], minlength=n)
        statistic = ((counts - 4000 / n) ** 2 / (4000 / n)).sum()
        assert statistic < n - 1 + 5 * np.sqrt(2 * (n - 1)) + 5


def test_neighbours_and_keys_are_unrelated() -> None:
    n = 10_000
    first, second = (Permutation(n, key).map(np.arange(n)) for key in ("a", "b"))
    for one, other in ((first[:-1], first[1:]), (first, np.arange(n)), (first, second)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_golden_vectors() -> None:
    """The order is a promise: a run that goes on, or is looked at later, must find the same one."""
    assert Permutation(10, "key").map(np.arange(10)).tolist() == [0, 5, 7, 3, 6, 2, 8, 4, 9, 1]
    assert Permutation(10**12, "key")(123456789) == 733554637885
    order = PermutationOrder(np.array([5, 1, 9, 30, 2, 17, 8, 4, 12, 3], np.int32), (0, 9), 40, 8, 1234)
    assert (order.num_epochs, order.epoch_samples, order.num_tokens, len(order)) == (4, 11, 88, 44)
    # fmt: off
    assert [order.sample(i) for i in range(44)] == [
        3, 0, 5, 4, 7, 2, 1, 10, 6, 8, 9, 11, 15, 17, 19, 18, 14, 16, 20, 13, 21, 12,
        28, 25, 24, 27, 30, 31, 32, 23, 26, 29, 22, 34, 35, 42, 36, 40, 38, 43, 37, 39, 41, 33,
    ]
    # fmt: on


@QUICK
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    num_samples=st.integers(0, 60),
    length=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_agrees_with_a_slow_list(
    sizes: list[int], num_samples: int, length: int, seed: int, data: st.DataObject
) -> None:
    documents: np.ndarray | tuple[int, int]
    if data.draw(st.booleans()):
        low = data.draw(st.integers(0, len(sizes) - 1))
        documents = (low, data.draw(st.integers(low, len(sizes))))
        chosen = list(range(*documents))
    else:
        chosen = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, unique=True))
        documents = np.array(chosen)
    stream = [(d, at) for d in chosen for at in range(sizes[d])]
    if not stream:
        with pytest.raises(UserError, match="hold no token"):
            PermutationOrder(np.array(sizes, np.int32), documents, num_samples, length, seed)
        return
    order = PermutationOrder(np.array(sizes, np.int32), documents, num_samples, length, seed)
    assert len(order) >= num_samples
    assert sorted(order.sample(i) for i in range(len(order))) == list(range(len(order)))
    holders: dict[int, list[int]] = {d: [] for d in range(len(sizes))}
    for i in range(len(order)):
        found = [(s, at) for s, offset, size in order.locate(i) for at in range(offset, offset + size)]
        start = order.sample(i) * length
        assert found == [stream[(start + k) % len(stream)] for k in range(length + 1)]
        for d in {s for s, _ in found}:
            holders[d].append(i)
    for d, numbers in holders.items():  # `find` is the inverse of `locate`
        assert order.find(d).tolist() == numbers
    with pytest.raises(UserError, match="data order holds"):
        order.locate(len(order))


@QUICK
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=9), length=st.integers(1, 20), epochs=st.integers(1, 6))
def test_epochs_leave_no_token_out(sizes: list[int], length: int, epochs: int) -> None:
    """In E epochs every token is an input floor or ceil(E n L / T) times."""
    order = PermutationOrder(np.array(sizes, np.int32), (0, len(sizes)), 0, length, 1)
    served = order.epoch_samples * epochs
    order = PermutationOrder(np.array(sizes, np.int32), (0, len(sizes)), served, length, 1)
    assert order.num_epochs == epochs
    starts = np.concatenate([[0], np.cumsum(sizes)])
    seen = np.zeros(starts[-1], int)
    for i in range(served):
        inputs = [starts[s] + at for s, offset, size in order.locate(i) for at in range(offset, offset + size)][:-1]
        np.add.at(seen, inputs, 1)
    exact = served * length / starts[-1]
    assert np.floor(exact) <= seen.min() and seen.max() <= np.ceil(exact)


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    sizes = np.arange(1, 60, dtype=np.int32)
    short, long = (PermutationOrder(sizes, (0, 59), n, 16, 7) for n in (10, 1000))
    assert [short.locate(i) for i in range(10)] == [long.locate(i) for i in range(10)]
    assert short.locate(0) != PermutationOrder(sizes, (0, 59), 10, 16, 8).locate(0)


def test_it_travels_to_another_process() -> None:
    order = PermutationOrder(np.arange(1, 60, dtype=np.int32), (0, 59), 10, 16, 7)
    assert pickle.loads(pickle.dumps(order)).locate(5) == order.locate(5)
