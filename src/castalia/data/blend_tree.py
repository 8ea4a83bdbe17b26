"""Weights of several data sets -> which of them each sample comes from, computed and not stored.

                 samples m of a node              a tree by Huffman's rule, lightest weights deepest;
                /                 \\               the light side of a node has taken round(p m) of its
       round(p m) to the light   the rest         first m samples, p its share of the node's weight

The n-th sample goes down the tree, the j-th sample of a set goes up it: a few exact whole-number
operations each way, whatever the length of the run. Every prefix of the order is close to its
shares: with two sets each is within 1/2 of a sample, with three within 1, with any number within
1.68. (Rounding at a node is off by at most 1/2, of which a leaf gets its share of the node's child;
from a leaf upwards weights grow at least like Fibonacci's numbers, by Huffman's rule, and half the
sum of the inverses of these is 1.68.) The blend of a shorter run is the beginning of a longer one's.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from castalia.data.blend import check_weights


class ComputedBlend:
    """A blend in memory that depends on the number of sets alone.

    Args:
        weights: one for each data set, not all 0, exact as the float64 they are; a set of weight 0 gets nothing.
        num_samples: samples of the blend.
    """

    def __init__(self, weights: Sequence[float], num_samples: int) -> None:
        check_weights(weights)
        self.num_samples = num_samples
        exact = [Fraction(weight) for weight in weights]
        # Heap entries: weight, tie-breaker, node; a node is a set's number or an entry of `_nodes`.
        heap = [(weight, k, k) for k, weight in enumerate(exact) if weight > 0]
        heapq.heapify(heap)
        self._nodes: dict[int, tuple[int, int, int, int]] = {}  # node -> light child, heavy child, p as a / b
        self._parent: dict[int, int] = {}
        made = len(exact)
        while len(heap) > 1:
            light, heavy = heapq.heappop(heap), heapq.heappop(heap)
            share = light[0] / (light[0] + heavy[0])
            self._nodes[made] = (light[2], heavy[2], share.numerator, share.denominator)
            self._parent[light[2]] = self._parent[heavy[2]] = made
            heapq.heappush(heap, (light[0] + heavy[0], made, made))
            made += 1
        self._root = heap[0][2]

    def __len__(self) -> int:
        return self.num_samples

    def at(self, n: int) -> tuple[int, int]:
        """The set of the n-th sample, and its how-manieth sample that is."""
        node = self._root
        while node in self._nodes:
            light, heavy, a, b = self._nodes[node]
            before = _rounded(a, b, n)
            node, n = (light, before) if _rounded(a, b, n + 1) > before else (heavy, n - before)
        return node, n

    def taken(self, k: int) -> int:
        """Samples that set `k` gives to the whole blend."""
        path, node = [], k
        while node in self._parent:
            path.append(node)
            node = self._parent[node]
        count = self.num_samples if node == self._root else 0  # a set of weight 0 is in no tree
        for child in reversed(path):
            light, _, a, b = self._nodes[self._parent[child]]
            count = _rounded(a, b, count) if child == light else count - _rounded(a, b, count)
        return count

    def numbers(self, k: int, samples: np.ndarray) -> np.ndarray:
        """Where in the blend the given samples of set `k` are: int64, ascending as `samples`; those beyond left out."""
        taken = self.taken(k)
        return np.array([self._number(k, j) for j in samples.tolist() if j < taken], np.int64)

    def _number(self, k: int, j: int) -> int:
        node = k
        while node in self._parent:
            child, node = node, self._parent[node]
            light, _, a, b = self._nodes[node]
            # The smallest m of which the child has taken j + 1 by m + 1. The light one has taken
            # floor((2 a m + b) / 2 b) of m, the heavy one the rest, ceil((2 (b - a) m - b) / 2 b).
            j = -(-(2 * j + 1) * b // (2 * a)) - 1 if child == light else (2 * j + 1) * b // (2 * (b - a))
        return j


def _rounded(a: int, b: int, m: int) -> int:
    """a m / b, to the nearest whole number, halves up."""
    return (2 * a * m + b) // (2 * b)
