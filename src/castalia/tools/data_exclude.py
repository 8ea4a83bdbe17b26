"""Choose documents of a data set and write them into a list of exclusions (castalia.data.exclusions).

--docs, --duplicates, --longer-than ──> sequence numbers ──added to──> LIST.txt
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from castalia.data.exclusions import load_exclusions, parse_range, save_exclusions
from castalia.data.store import TokenStore
from castalia.errors import UserError
from castalia.tools.data_scan import duplicates


def exclude(
    prefix: str,
    path: str | os.PathLike[str],
    docs: str | None = None,
    equal_ones: bool = False,
    longer_than: int | None = None,
    reason: str = "",
) -> dict[str, Any]:
    """Add documents to a list; one that exists keeps what it has, and its comments are replaced.

    Args:
        prefix: of the data set, as the configuration names it.
        path: the list.
        docs: numbers and ranges, such as "17,200-299".
        equal_ones: documents that equal an earlier one.
        longer_than: documents of more tokens.
        reason: a comment.

    Raises:
        UserError: nothing is chosen, or a document does not exist.
    """
    store = TokenStore(prefix)
    if docs is None and not equal_ones and longer_than is None:
        raise UserError("nothing is chosen: say --docs, --duplicates or --longer-than")
    chosen = [np.empty(0, np.int64)]
    for part in docs.split(",") if docs is not None else ():
        low, high = parse_range(part) or (1, 0)
        if not low <= high < len(store):
            raise UserError(f"--docs {part}: give documents of 0 to {len(store) - 1}, such as 17,200-299")
        chosen.append(np.arange(low, high + 1))
    if equal_ones:
        chosen.append(duplicates(store))
    if longer_than is not None:
        chosen.append(np.flatnonzero(store.sizes > longer_than))
    known = load_exclusions(path) if Path(path).exists() else {}
    numbers = np.unique(np.concatenate([*chosen, known.get(prefix, chosen[0])]))
    save_exclusions(path, {**known, prefix: numbers}, reason)
    tokens = int(store.sizes[numbers].sum(dtype=np.int64))
    share = tokens / max(1, store.num_tokens)
    return {"list": os.fspath(path), "data": prefix, "documents": len(numbers), "tokens": tokens, "share": share}
