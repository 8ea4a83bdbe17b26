"""What a token data set is like: documents, their lengths, the most frequent ids, bytes per token.

one pass over the ids ─> counts of every id; one over the index ─> lengths by powers of two
"""

from __future__ import annotations

from typing import Any

import numpy as np

from castalia.data.store import TokenStore
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import UserError
from castalia.tools.data_check import kept_tokenizer
from castalia.tools.data_scan import frequencies


def store_stats(prefix: str, tokenizer_path: str | None = None, top: int = 20) -> dict[str, Any]:
    """Figures of a data set, as plain data.

    Args:
        prefix: of the data set.
        tokenizer_path: to show ids as text; None: the one beside the data.
        top: so many of the most frequent ids.

    Raises:
        UserError: the data cannot be read, or holds no ids.
    """
    store = TokenStore(prefix)
    if store.dtype.kind not in "iu":
        raise UserError(f"{prefix} holds {store.dtype.name} numbers, no ids: there is nothing to count")
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else kept_tokenizer(prefix, store.info or {})
    counts = frequencies(store)
    # Bin k holds lengths in [2^(k-1), 2^k); bin 0 the empty documents.
    bins = np.zeros(33, np.int64)
    least, greatest = 2**31, 0
    for start in range(0, len(store), 1 << 17):
        sizes = store.sizes[start : start + (1 << 17)]
        bins += np.bincount(np.frexp(sizes.astype(np.float64))[1], minlength=33)
        least, greatest = min(least, int(sizes.min())), max(greatest, int(sizes.max()))
    histogram = [
        {"from": 2 ** (k - 1) if k else 0, "to": 2**k - 1 if k else 0, "documents": int(bins[k])}
        for k in np.flatnonzero(bins).tolist()
    ]
    frequent = np.argsort(-counts, kind="stable")[: max(0, top)]
    rows: list[dict[str, Any]] = []
    for i in frequent[counts[frequent] > 0].tolist():
        rows.append({"id": i, "count": int(counts[i]), "share": int(counts[i]) / store.num_tokens})
        if tokenizer is not None and i < tokenizer.vocab_size:
            rows[-1]["text"] = tokenizer.decode([i])
    return {
        "data": prefix,
        "dtype": store.dtype.name,
        "documents": len(store),
        "tokens": store.num_tokens,
        "bytes_per_token": _bytes_per_token(store, tokenizer, counts),
        "lengths": {
            "least": least if len(store) else 0,
            "mean": store.num_tokens / max(1, len(store)),
            "greatest": greatest,
            "histogram": histogram,
        },
        "distinct_ids": int(np.count_nonzero(counts)),
        "frequent": rows,
    }


def _bytes_per_token(store: TokenStore, tokenizer: Any, counts: np.ndarray) -> float | None:
    """As PREFIX.json says; else as the tokenizer's table of bytes has it, where it keeps every byte."""
    if not store.num_tokens:
        return None
    if store.info is not None and "bytes" in store.info:
        return float(store.info["bytes"] / store.num_tokens)
    table = tokenizer.token_bytes() if tokenizer is not None else None
    if table is None or len(counts) > len(table):
        return None
    return float(counts @ table[: len(counts)].astype(np.int64) / store.num_tokens)
