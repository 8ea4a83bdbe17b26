"""Which tokens make up sample i: GPT-NeoX's order, bit for bit, as index arithmetic.

    documents, E times over ──shuffle──> doc_idx ──end to end──> one stream of tokens
    stream cut every L tokens: sample k = tokens [kL, kL + L]      (neighbours share one token)
    0..S-1 ──shuffle, same random stream──> shuffle_idx: the i-th sample served is shuffle_idx[i]

GPT-NeoX stores a row (position in doc_idx, offset) for every sample; here it is found when
asked for, by a binary search in the running sums of the document sizes, which gives the same
rows; one sum is kept for every 32 documents, the others are added up when needed. The
shuffles are numpy's legacy `RandomState`, since its draws define the order; they cannot be
computed piecemeal, so large ones are kept in a cache that the processes of a machine share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from castalia.data.order_cache import Arrays, shared_arrays
from castalia.data.store import HEADER, TokenStore
from castalia.errors import UserError

SPLIT_NAMES = ("train", "valid", "test")
_STRIDE = 32  # documents from one kept running sum to the next
_PART = 1 << 18  # documents handled at once
_SHARED_FROM = 1 << 20  # entries from which on an order is worth a file


class Piece(NamedTuple):
    """A run of ids inside one sequence: ids [offset, offset + length) of sequence `sequence`."""

    sequence: int
    offset: int
    length: int


class GPTNeoXOrder:
    """The order in which GPT-NeoX serves the samples of a packed data set.

    Args:
        sizes: the store, for large orders that processes share; or int32 [S], ids of every sequence of it.
        documents: sequence numbers that take part, as an array or as a range (lo, hi).
        num_samples: samples that will be asked for; it decides how many epochs are laid
            end to end and so, as in GPT-NeoX, the whole order.
        seq_length: L, tokens a model sees; samples have L + 1.
        seed: seed of the one random stream.

    Attributes:
        num_epochs: E, the fewest epochs that hold `num_samples` samples.
        num_built: samples in the stream, (E T - 1) // L; GPT-NeoX never serves the last of them.
        doc_idx: int32 [E N], sequence numbers in stream order.
        shuffle_idx: uint32 (int64 from 2^32 - 2 on) [num_built].

    Raises:
        UserError: the documents hold no token.
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
        self.seq_length = seq_length
        self.num_samples = num_samples
        if isinstance(sizes, TokenStore) and sizes.lazy:
            sizes.check()  # every size is about to be used
        self._sizes = sizes.sizes if isinstance(sizes, TokenStore) else np.asarray(sizes)
        if isinstance(documents, tuple):
            number = len(range(*documents))
            tokens = _tokens_of_range(sizes, *documents)
        else:
            number = len(documents)
            tokens = int(self._sizes[documents].sum(dtype=np.int64))
        if tokens == 0:
            raise UserError(
                f"the {number} documents of this part of the data hold no token: prepare more text or change data.split"
            )
        self.num_epochs = max(1, -(-(num_samples * seq_length + 1) // tokens))
        self.num_built = (self.num_epochs * tokens - 1) // seq_length

        def make() -> Arrays:
            return _shuffle(self._sizes, documents, self.num_epochs, self.num_built, seed)

        length = number * self.num_epochs + self.num_built
        if isinstance(sizes, TokenStore) and isinstance(documents, tuple) and length >= _SHARED_FROM:
            key = {
                "order": "gptneox 2",
                "sizes": sizes_digest(sizes, *documents),
                "documents": [int(edge) for edge in documents],
                "epochs": self.num_epochs,
                "samples": self.num_built,
                "seed": seed,
            }
            arrays = shared_arrays(key, make)
        else:
            arrays = make()
        self.doc_idx: np.ndarray = arrays["doc_idx"]
        self.shuffle_idx: np.ndarray = arrays["shuffle_idx"]
        self._sums = arrays["sums"]

    def __len__(self) -> int:
        """Samples that may be asked for: all but the last, as in GPT-NeoX, yet never fewer than requested."""
        return max(self.num_samples, self.num_built - 1)

    def sample(self, i: int) -> int:
        """Place in the stream of the i-th sample served.

        Where the epochs hold exactly the requested number, GPT-NeoX, which withholds the last
        sample, starts again at its first one for the last request; so does this.

        Raises:
            UserError: beyond what was requested and built (GPT-NeoX would silently start again).
        """
        if not 0 <= i < len(self):
            raise UserError(
                f"sample {i} was asked for, but the data order holds {len(self)} samples: "
                f"ask for fewer steps, or build the order for more samples"
            )
        return int(self.shuffle_idx[i % max(1, self.num_built - 1)])

    def locate(self, i: int) -> list[Piece]:
        """Where the L + 1 ids of the i-th sample served lie; logarithmic in the number of documents."""
        first = self.sample(i) * self.seq_length
        return self.locate_span(first, first + self.seq_length + 1)

    def locate_span(self, first: int, end: int) -> list[Piece]:
        """Where tokens [first, end) of the stream lie."""
        if not 0 <= first <= end <= self._sums[-1]:
            raise IndexError(f"tokens [{first}, {end}) of a stream of {self._sums[-1]}")
        block = int(np.searchsorted(self._sums, first, side="right")) - 1
        pieces = []
        while first < end:
            starts = self._starts(block)
            j = int(np.searchsorted(starts, first, side="right")) - 1
            while first < end and j + 1 < len(starts):
                stop = min(end, int(starts[j + 1]))
                if stop > first:  # documents without tokens are stepped over
                    sequence = int(self.doc_idx[block * _STRIDE + j])
                    pieces.append(Piece(sequence, first - int(starts[j]), stop - first))
                    first = stop
                j += 1
            block += 1
        return pieces

    def find(self, sequence: int) -> np.ndarray:
        """Numbers of the samples that hold any token of a sequence: int64, ascending; linear in the order's length."""
        places: list[np.ndarray] = []
        served = max(1, self.num_built - 1)
        for position in _positions(self.doc_idx, np.array([sequence])):
            block, j = divmod(int(position), _STRIDE)
            first, end = self._starts(block)[j : j + 2].tolist()
            if end > first:  # sample k holds tokens [kL, kL + L], ends included
                places.append(np.arange(max(0, -(-first // self.seq_length) - 1), (end - 1) // self.seq_length + 1))
        if not places:
            return np.empty(0, np.int64)
        numbers = _positions(self.shuffle_idx[:served], np.unique(np.concatenate(places)))
        again = numbers + served
        return np.concatenate([numbers, again[again < len(self)]])

    def _starts(self, block: int) -> np.ndarray:
        """Where each document of a block of doc_idx begins in the stream, and the last one ends."""
        sizes = self._sizes[self.doc_idx[block * _STRIDE : (block + 1) * _STRIDE]]
        starts = np.full(len(sizes) + 1, self._sums[block], np.int64)
        starts[1:] += np.cumsum(sizes, dtype=np.int64)
        return starts

    def sample_idx(self) -> np.ndarray:
        """GPT-NeoX's table: int32 [num_built + 1, 2] of (position in doc_idx, offset), row k for token k L.

        int64 where a position does not fit (there GPT-NeoX v2.0 overflows).
        """
        starts = np.zeros(len(self.doc_idx) + 1, np.int64)
        np.cumsum(self._sizes[self.doc_idx], dtype=np.int64, out=starts[1:])
        at = np.arange(self.num_built + 1, dtype=np.int64) * self.seq_length
        rows = np.empty((len(at), 2), np.int32 if len(self.doc_idx) < 2**31 else np.int64)
        position = np.searchsorted(starts, at, side="right") - 1
        rows[:, 0] = position
        rows[:, 1] = at - starts[position]
        rows[0] = 0
        return rows


def _tokens_of_range(sizes: TokenStore | np.ndarray, low: int, high: int) -> int:
    """Tokens of documents [low, high); of a store by its pointers, so that its sizes need not be read."""
    if not isinstance(sizes, TokenStore):
        return int(sizes[low:high].sum(dtype=np.int64))
    ends = [int(sizes.pointers[i]) if i < len(sizes) else sizes.num_tokens * sizes.dtype.itemsize for i in (low, high)]
    return (ends[1] - ends[0]) // sizes.dtype.itemsize


def sizes_digest(store: TokenStore, low: int, high: int) -> str:
    """SHA-256 of what an order takes from an index, read in parts: all of it would be five times as much."""
    digest = hashlib.sha256()
    with open(store.idx_path, "rb") as file:
        for start in range(low, high, _PART):
            file.seek(HEADER.size + 4 * start)
            digest.update(file.read(4 * min(_PART, high - start)))
    return digest.hexdigest()


def _shuffle(
    sizes: np.ndarray, documents: np.ndarray | tuple[int, int], num_epochs: int, num_built: int, seed: int
) -> Arrays:
    """doc_idx, shuffle_idx and the running sums of the sizes, int64, at every 32nd place of doc_idx and the end."""
    # The draws do not depend on the dtype, and numpy moves entries of 8 bytes faster than others.
    if isinstance(documents, tuple):
        number = len(range(*documents))
        stream = np.arange(num_epochs * number)
        if num_epochs > 1:
            stream %= number
        stream += documents[0]
    else:
        stream = np.empty(num_epochs * len(documents), np.int64)
        stream.reshape(num_epochs, -1)[:] = documents
    random = np.random.RandomState(seed)
    random.shuffle(stream)
    doc_idx = _narrow(stream, np.dtype(np.int32))
    sums = np.zeros(-(-len(doc_idx) // _STRIDE) + 1, np.int64)
    for start in range(0, len(doc_idx), _PART):
        part = sizes[doc_idx[start : start + _PART]]
        to = start // _STRIDE + 1
        edges = np.arange(0, len(part), _STRIDE)
        sums[to : to + len(edges)] = np.add.reduceat(part, edges, dtype=np.int64)
    np.cumsum(sums, out=sums)
    samples = np.arange(num_built)
    random.shuffle(samples)
    shuffle_idx = _narrow(samples, np.dtype(np.uint32)) if num_built < 2**32 - 2 else samples
    return {"doc_idx": doc_idx, "shuffle_idx": shuffle_idx, "sums": sums}


def _narrow(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """int64 [n] -> a 4-byte dtype in the same memory, half of which is given back; the argument is used up."""
    number = len(array)
    narrow = array.view(dtype)
    for start in range(0, number, _PART):
        narrow[start : min(start + _PART, number)] = array[start : start + _PART]
    del narrow
    array.resize((number + 1) // 2, refcheck=False)
    return array.view(dtype)[:number]


def _positions(array: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where an array holds any of the values: int64, ascending; in parts, to need little memory."""
    found = [
        start + np.flatnonzero(np.isin(array[start : start + _PART], values)) for start in range(0, len(array), _PART)
    ]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def split_documents(
    num_documents: int, split: str, needed: Collection[str] = ("train",)
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Ranges (lo, hi) of the documents for training, validation and test, as GPT-NeoX cuts them.

    Args:
        num_documents: documents in the data set.
        split: shares such as "969,30,1", separated by commas or slashes; missing ones are 0.
        needed: the parts ("train", "valid", "test") that must not be empty.

    Raises:
        UserError: the shares cannot be read or are more than three, or a needed part has no document.
    """
    separator = "," if "," in split else "/"
    try:
        shares = [float(part) for part in split.split(separator)]
    except ValueError:
        raise UserError(f'data.split is {split!r}: give shares such as "969,30,1"') from None
    if len(shares) > 3:  # GPT-NeoX takes the first three and says nothing
        raise UserError(f"data.split is {split!r}: give at most three shares, for training, validation and test")
    shares += [0.0] * (3 - len(shares))
    total = sum(shares)
    if not math.isfinite(total) or total <= 0 or min(shares) < 0:
        raise UserError(f'data.split is {split!r}: give shares such as "969,30,1", none negative, not all zero')
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * num_documents))
    # GPT-NeoX takes the rounding error off every boundary, not the last alone. Where the
    # first share is 0 that makes a boundary negative, which is mended here.
    excess = bounds[3] - num_documents
    bounds = [0] + [min(max(bound - excess, 0), num_documents) for bound in bounds[1:]]
    ranges = [(bounds[k], bounds[k + 1]) for k in range(3)]
    for name, share, (lo, hi) in zip(SPLIT_NAMES, shares, ranges, strict=True):
        if name in needed and hi <= lo:
            raise UserError(
                f"data.split {split!r} leaves the {name} part empty: its share {share:g} of {total:g} of "
                f"{num_documents} documents is none; raise the share or prepare more documents"
            )
    return ranges[0], ranges[1], ranges[2]
