"""A tokenizer and a sample of text -> how well the one fits the other.

Fertility is given in bytes per token, which compares tokenizers whatever their vocabulary; the
round trip tells whether text survives, which no score of the model will show.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from castalia.data.tokenizer.base import Tokenizer, encode_flat, special_tokens

_BATCH = 256


def inspect_tokenizer(tokenizer: Tokenizer, texts: Iterable[str] = (), limit: int = 10_000_000) -> dict[str, Any]:
    """What a tokenizer is and, where texts are given, how it does on about the first `limit` bytes of them.

    Returns:
        The identity, `special_tokens`, `exact_bytes` (whether bits per byte can be given), and of the
        sample `documents`, `bytes`, `tokens`, `bytes_per_token`, `unknown_rate` (of the ids; None where no
        unknown token exists), `round_trip` (share of documents that come back), `first_changed` (the
        number of the first that does not), `ids_used` and `special_in_text` (how many ids of the sample
        are special tokens that stood in the text).
    """
    answer = {
        **tokenizer.identity(),
        "special_tokens": special_tokens(tokenizer),
        "exact_bytes": tokenizer.token_bytes() is not None,
    }
    unknown = getattr(tokenizer, "unknown", None)
    special = np.array(sorted(special_tokens(tokenizer).values()), np.int64)
    used = np.zeros(tokenizer.vocab_size, bool)
    documents = size = tokens = unknowns = same = specials = 0
    first_changed: int | None = None
    batch: list[str] = []

    def count() -> None:
        nonlocal documents, size, tokens, unknowns, same, specials, first_changed
        ids, ends = encode_flat(tokenizer, batch)
        for text, start, end in zip(batch, [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            if tokenizer.decode(ids[start:end].tolist()) == text:
                same += 1
            elif first_changed is None:
                first_changed = documents
            documents += 1
        tokens += ids.size
        unknowns += int((ids == unknown).sum()) if unknown is not None else 0
        specials += int(np.isin(ids, special).sum())
        used[ids] = True

    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if len(batch) == _BATCH or size >= limit:
            count()
            batch = []
        if size >= limit:
            break
    if batch:
        count()
    if documents == 0:
        return answer
    return answer | {
        "documents": documents,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / max(tokens, 1),
        "unknown_rate": None if unknown is None else unknowns / max(tokens, 1),
        "round_trip": same / documents,
        "first_changed": first_changed,
        "ids_used": int(used.sum()),
        "special_in_text": specials,
    }
