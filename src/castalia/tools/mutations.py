"""Damage done at random to the index of a data set: a clear refusal or right ids, never anything else.

    PREFIX.idx ──bytes flipped, cut, grown, fields made extreme──> opened whole, opened lazily,
                                                                  read through an order
                  ──> UserError, or exactly the ids that were written; within a few MiB of memory

One change contradicts nothing and passes: without PREFIX.json, a dtype code that names another type of
the same width. It is left out where there is no PREFIX.json to hold it against.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from castalia.data.order_permutation import PermutationOrder
from castalia.data.store import HEADER, StoreWriter, TokenStore
from castalia.errors import CheckFailed, UserError

_DTYPE_AT = 17
_MOST_BYTES = 32 << 20  # of memory, for a data set of a few hundred ids
_EXTREMES = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutate_indices(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Open `count` damaged indices, half of them beside a PREFIX.json.

    Returns:
        How many were `refused` when opened whole, `refused_lazily` when opened lazily and read,
        and `harmless` both ways.

    Raises:
        CheckFailed: one gave other ids, another exception than UserError, or took much memory.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    documents = [[draw.randrange(50000) for _ in range(draw.choice((0, 1, 2, 5, 40)))] for _ in range(24)]
    result = {"refused": 0, "refused_lazily": 0, "harmless": 0}
    tracemalloc.start()
    try:
        for with_info in (True, False):
            prefix = folder / ("described" if with_info else "bare")
            info = {"version": 1, "tokenizer": {"type": "x", "vocab_size": 50000}}
            with StoreWriter(prefix, np.uint16) as writer:
                writer.add_documents(documents)
                writer.finish(info if with_info else None)
            path = Path(f"{prefix}.idx")
            whole = path.read_bytes()
            for number in range(count // 2):
                damaged = _damage(bytearray(whole), draw, with_info)
                path.write_bytes(damaged)
                tracemalloc.reset_peak()
                try:
                    refusals = [_refused(prefix, documents, lazy) for lazy in (False, True)]
                except Exception as error:
                    kept = folder / "offending.idx"
                    kept.write_bytes(damaged)
                    text = f"damaged index {number} of seed {seed}: {type(error).__name__}: {error}"
                    raise CheckFailed(f"{text}; the file is {kept}") from error
                if (peak := tracemalloc.get_traced_memory()[1]) > _MOST_BYTES:
                    raise CheckFailed(f"damaged index {number} of seed {seed} took {peak} bytes of memory")
                result["refused"] += refusals[0]
                result["refused_lazily"] += refusals[1]
                result["harmless"] += not any(refusals)
    finally:
        tracemalloc.stop()
    return result


def _refused(prefix: Path, documents: list[list[int]], lazy: bool) -> bool:
    """Whether the data set is refused somewhere; what it does give must be right."""
    refused = False
    try:
        store = TokenStore(prefix, lazy=lazy)
    except UserError:
        return True
    for i, ids in enumerate(documents):
        try:
            found = store.get(i).tolist()
        except UserError:
            refused = True
        else:
            _same(found, ids)
    if len(store) != len(documents):
        raise ValueError(f"{len(store)} documents")
    for low, high in ((0, len(documents)), (5, 17)):
        stream = [i for ids in documents[low:high] for i in ids]
        try:
            order = PermutationOrder(store, (low, high), 40, 8, 1)
        except UserError:
            refused = True
            continue
        for i in range(len(order)):
            first = order.sample(i) * 8
            try:
                found = [i for piece in order.locate(i) for i in store.get(*piece).tolist()]
            except UserError:
                refused = True
            else:
                _same(found, [stream[(first + k) % len(stream)] for k in range(9)])
    return refused


def _same(found: list[int], expected: list[int]) -> None:
    if found != expected:
        raise ValueError(f"ids {found} instead of {expected}")


def _damage(content: bytearray, draw: random.Random, dtype_too: bool) -> bytes:
    before = bytes(content)
    while bytes(content) == before or (not dtype_too and content[_DTYPE_AT : _DTYPE_AT + 1] != b"\x08"):
        content[:] = before
        kind = draw.choice(("flip", "flip", "field", "field", "cut", "grow", "swap"))
        if kind == "flip":
            for _ in range(draw.choice((1, 1, 2, 8))):
                content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
        elif kind == "field":
            at, width = draw.choice(list(_fields(before)))
            value = draw.choice(_EXTREMES) if draw.random() < 0.7 else draw.randrange(64)
            content[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == "cut":
            del content[draw.randrange(len(content)) :]
            if len(content) <= _DTYPE_AT:
                break
        elif kind == "grow":
            content += draw.randbytes(draw.randrange(1, 100))
        else:  # two parts of the file change places
            one, other = (draw.randrange(HEADER.size, len(content) - 8) for _ in range(2))
            content[one : one + 8], content[other : other + 8] = content[other : other + 8], content[one : one + 8]
    return bytes(content)


def _fields(content: bytes) -> Iterator[tuple[int, int]]:
    """Place and width of every number in an index."""
    yield from ((9, 8), (17, 1), (18, 8), (26, 8))
    _, _, _, sequences, entries = HEADER.unpack(content[: HEADER.size])
    yield from ((HEADER.size + 4 * k, 4) for k in range(sequences))
    yield from ((HEADER.size + 4 * sequences + 8 * k, 8) for k in range(sequences + entries))
