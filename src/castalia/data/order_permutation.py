"""The order that needs no table: a keyed permutation that is computed, not stored.

    documents in file order, round and round ──> one endless stream of tokens
    stream cut every L tokens: sample g = tokens [gL, gL + L]        (neighbours share one token)
    n = T // L samples make an epoch: the i-th sample served is  g = e n + P_e(i mod n),  e = i // n

The index's own pointers are the running sums of the document sizes, so opening reads a few bytes
of it whatever its size, and P_e is a Feistel network over [0, n), keyed by seed and epoch: a few
multiplications per sample, and an inverse, which tells where a document was or will be served.

An epoch begins where the one before it stopped in the round, up to L - 1 tokens before the end
of the documents. So one epoch serves all tokens but those last T mod L < L of its round, each
once as an input; these come first in the next epoch; over the epochs no token is left out, and
documents are cut at other places each time. The order of a shorter run is the beginning of that
of a longer one.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from functools import lru_cache
from typing import Any

import numpy as np

from castalia.data.order import Piece
from castalia.data.store import TokenStore
from castalia.errors import UserError

_ROUNDS = 8
_WORD = 2**64 - 1


class Permutation:
    """A pseudo-random permutation of [0, n) in constant memory, with its inverse.

    A generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA
    2002): x = l + a r with a = ceil(sqrt n) and r < b = ceil(n / a); the halves are in turn moved, modulo
    a or b, by a hash of the other. The fewer than a numbers from n to a b are stepped over by
    applying it again ("cycle walking", same paper). Luby and Rackoff (1988) need 4 rounds of an ideal
    hash; here there are 8 of SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014).

    Args:
        n: numbers that are permuted, 1 to 2^62.
        key: what the permutation is a function of, besides n.
    """

    def __init__(self, n: int, key: str) -> None:
        if not 1 <= n <= 2**62:
            raise ValueError(f"a permutation of {n} numbers")
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * k : 8 * k + 8], "little") for k in range(_ROUNDS)]

    def __call__(self, x: int) -> int:
        """Where `x` goes."""
        return self._walk(self._forward, x)

    def inverse(self, y: int) -> int:
        """What goes to `y`."""
        return self._walk(self._backward, y)

    def map(self, x: np.ndarray) -> np.ndarray:
        """Where the numbers `x` go: int64, of the shape of `x`."""
        return self._walk_all(self._forward, x)

    def inverse_map(self, y: np.ndarray) -> np.ndarray:
        """What goes to the numbers `y`: int64, of the shape of `y`."""
        return self._walk_all(self._backward, y)

    # The rounds are written once, for int and for uint64 arrays (where `& _WORD` changes nothing).

    def _forward(self, x: Any) -> Any:
        left, right = x % self._a, x // self._a
        for k, key in enumerate(self._keys):
            if k % 2 == 0:
                left = (left + _mix(right, key) % self._a) % self._a
            else:
                right = (right + _mix(left, key) % self._b) % self._b
        return left + right * self._a

    def _backward(self, y: Any) -> Any:
        left, right = y % self._a, y // self._a
        for k, key in reversed(list(enumerate(self._keys))):
            if k % 2 == 0:
                left = (left + self._a - _mix(right, key) % self._a) % self._a
            else:
                right = (right + self._b - _mix(left, key) % self._b) % self._b
        return left + right * self._a

    def _walk(self, step: Any, x: int) -> int:
        if not 0 <= x < self.n:
            raise IndexError(f"{x} is not in [0, {self.n})")
        x = step(x)
        while x >= self.n:
            x = step(x)
        return x

    def _walk_all(self, step: Any, x: np.ndarray) -> np.ndarray:
        given = np.asarray(x)
        if given.size and not 0 <= given.min() <= given.max() < self.n:
            raise IndexError(f"numbers outside [0, {self.n})")
        out = step(given.astype(np.uint64).reshape(-1))
        while (beyond := np.flatnonzero(out >= self.n)).size:
            out[beyond] = step(out[beyond])
        return np.asarray(out.astype(np.int64).reshape(given.shape))


def _mix(x: Any, key: int) -> Any:
    """A 64-bit hash of x: the finaliser of SplitMix64 on x times the golden ratio, moved by the key."""
    z = (x * 0x9E3779B97F4A7C15 + key) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


class PermutationOrder:
    """The order in which samples are served by a permutation that is computed.

    Args:
        sizes: the store, whose index is read only where it is needed; or int32 [S], ids of every sequence,
            which are summed up here.
        documents: sequence numbers that take part: a range (lo, hi), or an array, for which the
            sizes are summed up here, 8 bytes each.
        num_samples: samples that will be asked for; it decides only how many epochs are promised.
        seq_length: L, tokens a model sees; samples have L + 1.
        seed: seed of the permutations.

    Attributes:
        num_epochs: E, the fewest epochs that hold `num_samples` samples.
        epoch_samples: n, samples in an epoch.
        num_tokens: T, tokens of the documents.

    Raises:
        UserError: the documents hold no token, or the index contradicts itself where it was read.
    """

    def __init__(
        self,
        sizes: TokenStore | np.ndarray,
        documents: np.ndarray | tuple[int, int],
        num_samples: int,
        seq_length: int,
        seed: int,
    ) -> None:
        if seq_length < 1 or num_samples < 0:
            raise ValueError(f"seq_length {seq_length} and num_samples {num_samples} must not be below 1 and 0")
        self._stream = _Stream(sizes, documents)
        self.num_tokens = self._stream.num_tokens
        if self.num_tokens == 0:
            raise UserError(
                f"the {len(self._stream)} documents of this part of the data hold no token: "
                f"prepare more text or change data.split"
            )
        self.seq_length = seq_length
        self.num_samples = num_samples
        self.seed = seed
        self.epoch_samples = max(1, self.num_tokens // seq_length)
        self.num_epochs = max(1, -(-num_samples // self.epoch_samples))
        self._permutation = lru_cache(maxsize=16)(self._make_permutation)

    def __len__(self) -> int:
        """Samples that may be asked for: those of whole epochs."""
        return self.num_epochs * self.epoch_samples

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_permutation"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._permutation = lru_cache(maxsize=16)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> Permutation:
        return Permutation(self.epoch_samples, f"castalia order 1 seed {self.seed} epoch {epoch}")

    def sample(self, i: int) -> int:
        """Place in the stream of the i-th sample served.

        Raises:
            UserError: beyond the epochs that were asked for.
        """
        if not 0 <= i < len(self):
            raise UserError(
                f"sample {i} was asked for, but the data order holds {len(self)} samples: "
                f"ask for fewer steps, or build the order for more samples"
            )
        epoch, at = divmod(i, self.epoch_samples)
        return epoch * self.epoch_samples + self._permutation(epoch)(at)

    def locate(self, i: int) -> list[Piece]:
        """Where the L + 1 ids of the i-th sample served lie; logarithmic in the number of documents."""
        first = self.sample(i) * self.seq_length
        return self.locate_span(first, first + self.seq_length + 1)

    def locate_span(self, first: int, end: int) -> list[Piece]:
        """Where tokens [first, end) of the endless stream lie."""
        pieces = []
        while first < end:
            turn, at = divmod(first, self.num_tokens)
            stop = min(end, (turn + 1) * self.num_tokens)
            pieces += self._stream.locate(at, at + stop - first)
            first = stop
        return pieces

    def find(self, sequence: int) -> np.ndarray:
        """Numbers of the samples that hold any token of a sequence: int64, ascending."""
        span = self._stream.span(sequence)
        if span is None or span[0] == span[1]:
            return np.empty(0, np.int64)
        found: list[np.ndarray] = []
        length, n, total = self.seq_length, self.epoch_samples, len(self)
        for turn in range(total * length // self.num_tokens + 1):
            first, end = (turn * self.num_tokens + edge for edge in span)
            # Sample g holds tokens [gL, gL + L], ends included.
            samples = np.arange(max(0, -(-first // length) - 1), min(total, (end - 1) // length + 1))
            for epoch in range(int(samples[0]) // n, int(samples[-1]) // n + 1) if samples.size else ():
                mine = samples[samples // n == epoch] - epoch * n
                found.append(self._permutation(epoch).inverse_map(mine) + epoch * n)
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


class _Stream:
    """Documents in the order given, end to end, once: where is token t?

    `edges[j]` in units of `unit` is where document j begins. Of a store these are the pointers of
    its index; they are not aligned in the file, so numpy would copy them all for a search of its own.
    """

    def __init__(self, sizes: TokenStore | np.ndarray, documents: np.ndarray | tuple[int, int]) -> None:
        self._name = sizes.prefix if isinstance(sizes, TokenStore) else "the data set"
        self._documents = documents
        if isinstance(sizes, TokenStore) and isinstance(documents, tuple):
            low, high = documents
            if not 0 <= low <= high <= len(sizes):
                raise ValueError(f"documents [{low}, {high}) of {len(sizes)}")
            self._unit = sizes.dtype.itemsize
            self._edges = sizes.pointers[low:high]
            end = sizes.num_tokens * self._unit
            self._end = int(sizes.pointers[high]) if high < len(sizes) else end
            self._begin = int(self._edges[0]) if high > low else self._end
            for edge, at in ((self._begin, low), (self._end, high)):
                before = int(sizes.pointers[at - 1]) + int(sizes.sizes[at - 1]) * self._unit if at > 0 else 0
                after = int(sizes.pointers[at]) if at < len(sizes) else end
                if not before == edge == after or edge % self._unit or not 0 <= edge <= end:
                    raise self._corrupt()
            if self._end < self._begin:
                raise self._corrupt()
        else:
            every = np.asarray(sizes.sizes if isinstance(sizes, TokenStore) else sizes)
            chosen = every[slice(*documents)] if isinstance(documents, tuple) else every[documents]
            ends = np.cumsum(chosen, dtype=np.int64)
            self._unit, self._begin = 1, 0
            self._edges = ends - chosen
            self._end = int(ends[-1]) if len(ends) else 0
        self.num_tokens = (self._end - self._begin) // self._unit

    def __len__(self) -> int:
        return len(self._edges)

    def _edge(self, j: int) -> int:
        """Tokens before document j."""
        edge = int(self._edges[j]) if j < len(self._edges) else self._end
        return (edge - self._begin) // self._unit

    def _corrupt(self) -> UserError:
        return UserError(f"{self._name}.idx is corrupt (its pointers contradict each other): prepare or copy it again")

    def locate(self, first: int, end: int) -> list[Piece]:
        """Pieces of tokens [first, end), within the documents."""
        j = bisect_right(self._edges, self._begin + first * self._unit) - 1
        pieces = []
        while first < end:
            start, stop = self._edge(j), self._edge(j + 1)
            if not start <= first <= stop:  # an index that was not checked as a whole
                raise self._corrupt()
            if (upto := min(end, stop)) > first:  # documents without tokens are stepped over
                sequence = self._documents[0] + j if isinstance(self._documents, tuple) else int(self._documents[j])
                pieces.append(Piece(sequence, first - start, upto - first))
                first = upto
            j += 1
        return pieces

    def span(self, sequence: int) -> tuple[int, int] | None:
        """Tokens [first, end) of a sequence, or None where it takes no part."""
        if isinstance(self._documents, tuple):
            low, high = self._documents
            j = sequence - low if low <= sequence < high else None
        else:
            at = np.flatnonzero(self._documents == sequence)
            j = int(at[0]) if at.size else None
        return None if j is None else (self._edge(j), self._edge(j + 1))
