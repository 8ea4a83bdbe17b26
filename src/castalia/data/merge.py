"""Several token data sets -> one, in the order given, without loading any of them.

    A.bin + B.bin + ... ──copied in blocks──> PREFIX.bin;   sizes of all ──> PREFIX.idx, .json

GPT-NeoX's own merge drops the document starts; here every sequence is a document, as its
preparation has them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from castalia.data.store import StoreWriter, TokenStore, is_finished
from castalia.errors import UserError

_DIFFER = ("tokenizer", "append_eod")  # what the parts must agree on, where they say it


def merge_stores(
    prefixes: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], overwrite: bool = False
) -> dict[str, Any]:
    """Merge data sets.

    Args:
        prefixes: of the parts, in the order of the output; one may be named several times.
        output: prefix of the whole.
        overwrite: replace a finished data set.

    Returns:
        `documents` and `tokens` of the whole.

    Raises:
        UserError: a part is damaged, parts were made differently, or the output exists or is a part.
    """
    output = os.fspath(output)
    if is_finished(output) and not overwrite:
        raise UserError(f"{output}.idx exists already: choose another output, or say --overwrite")
    if any(os.path.realpath(p) == os.path.realpath(output) for p in prefixes):
        raise UserError(f"{output} would be read and written at once: choose another output")
    stores = [TokenStore(prefix) for prefix in prefixes]
    first = stores[0]
    for store in stores[1:]:
        if store.dtype != first.dtype:
            raise UserError(
                f"{store.prefix} holds {store.dtype.name} and {first.prefix} {first.dtype.name}: "
                "bring them to one with `castalia data convert --dtype`"
            )
        for key in _DIFFER:
            mine, theirs = ((s.info or {}).get(key) for s in (first, store))
            if mine is not None and theirs is not None and mine != theirs:
                raise UserError(f"{store.prefix} and {first.prefix} were made with different {key}: prepare one anew")
    kept = Path(f"{first.prefix}.tokenizer.json")
    with StoreWriter(output, first.dtype) as writer:
        for store in stores:
            writer.add_documents(store.get(i) for i in range(len(store)))
        info = _merged_info(stores)
        attachments = {".tokenizer.json": kept.read_bytes()} if info is not None and kept.is_file() else None
        answer = {"documents": writer.num_documents, "tokens": writer.num_tokens}
        writer.finish(info, attachments)
    return answer


def _merged_info(stores: Sequence[TokenStore]) -> Mapping[str, Any] | None:
    """The description of the whole: sums and lists of those of the parts; None unless all have one."""
    infos = [store.info for store in stores if store.info is not None]
    if len(infos) < len(stores):
        return None
    whole = dict(infos[0])
    for key in ("documents", "tokens", "bytes"):
        if all(key in info for info in infos):
            whole[key] = sum(info[key] for info in infos)
        else:
            whole.pop(key, None)
    whole["sources"] = [source for info in infos for source in info.get("sources", [])]
    return whole
