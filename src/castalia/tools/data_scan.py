"""One pass over a token data set, in bounded memory: what `check`, `stats` and `exclude` look at.

    .bin ──parts of a few MiB, whole documents──> hashes, ends, ids out of range, counts

Documents are compared by a 64-bit hash, kept in a temporary file and looked at in
shares that fit into memory; those that agree are compared id by id, so what is called a duplicate is one.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from castalia.data.store import TokenStore

_PART = 1 << 21  # ids read at once, a longer document in several parts
_SHARE = 1 << 22  # hashes compared at once


def parts(store: TokenStore) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """A store from end to end: (first document, sizes int64 of whole documents, their ids end to end)."""
    block = 1 << 16
    for start in range(0, len(store), block):
        sizes = store.sizes[start : start + block].astype(np.int64)
        ends = np.cumsum(sizes)
        at = int(store.pointers[start]) // store.dtype.itemsize
        first = 0
        while first < len(sizes):
            before = int(ends[first - 1]) if first else 0
            upto = max(first + 1, int(np.searchsorted(ends, before + _PART, side="right")))
            yield start + first, sizes[first:upto], store.tokens[at + before : at + int(ends[upto - 1])]
            first = upto


def frequencies(store: TokenStore) -> np.ndarray:
    """How often each id occurs: int64 [greatest id + 1]. Ids must not be negative."""
    counts = np.zeros(0, np.int64)
    for _, _, ids in parts(store):
        for start in range(0, len(ids), _PART):
            more = np.bincount(ids[start : start + _PART])
            if len(more) > len(counts):
                counts = np.concatenate([counts, np.zeros(len(more) - len(counts), np.int64)])
            counts[: len(more)] += more
    return counts


def duplicates(store: TokenStore) -> np.ndarray:
    """Documents that equal an earlier one, id by id: int64, ascending. Empty documents are not among them."""
    with tempfile.TemporaryFile() as file:
        for _, sizes, ids in parts(store):
            ends = np.cumsum(sizes).tolist()
            hashes = bytearray()
            start = 0
            for end in ends:
                hashes += hashlib.blake2b(ids[start:end].data, digest_size=8).digest()
                start = end
            file.write(hashes)
        shares = -(-len(store) // _SHARE)
        found = [_equal_ones(store, file, share, shares) for share in range(shares)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *found]))


def _equal_ones(store: TokenStore, file: BinaryIO, share: int, shares: int) -> np.ndarray:
    """Duplicates among the documents whose hash belongs to a share of all hashes."""
    file.seek(0)
    kept, numbers, start = [], [], 0
    while len(part := np.frombuffer(file.read(8 << 20), np.uint64)):
        mine = np.flatnonzero(part % np.uint64(shares) == share)
        kept.append(part[mine])
        numbers.append(mine + start)
        start += len(part)
    hashes, documents = np.concatenate(kept), np.concatenate(numbers)
    order = np.argsort(hashes, kind="stable")
    hashes, documents = hashes[order], documents[order]
    same = hashes[1:] == hashes[:-1]
    found = []
    first = 0
    for k in np.flatnonzero(same).tolist():
        if k == 0 or not same[k - 1]:
            first = k  # the earliest of those that agree, since the sort is stable
        one, other = store.get(int(documents[first])), store.get(int(documents[k + 1]))
        if len(one) and np.array_equal(one, other):
            found.append(int(documents[k + 1]))
    return np.array(found, np.int64)
