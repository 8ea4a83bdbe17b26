"""Token data sets of other makers -> ours: the old TNTIDX index, Megatron-LM's float codes, other dtypes.

    TNTIDX (lazy, cached)  ─┐
    MMIDIDX, wrong code or  ├─sequence by sequence─> PREFIX.bin, .idx (MMIDIDX), .json where it was there
    doc_idx, other dtype   ─┘

The output has one document per sequence, as GPT-NeoX's training has always read its data; so
a doc_idx that a merge has lost is there again.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from castalia.data.store import DTYPES, MEGATRON_DTYPES, OLD_MAGIC, StoreWriter, TokenStore, is_finished, store_files
from castalia.errors import UserError

_OLD_HEADER = struct.Struct("<8s6Q")  # magic, version, dtype code, bytes of an element, items, sizes, documents
_PART = 1 << 16


def convert(
    prefix: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: str | None = None,
    megatron_floats: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a data set anew, in the memory-mapped format.

    Args:
        prefix: of the data set to read, in either format.
        output: prefix of the one to write.
        dtype: of its ids, such as uint16 or int32; None: as it was.
        megatron_floats: the input has Megatron-LM's codes for float32 and float64, which are GPT-NeoX's swapped.
        overwrite: replace a finished data set.

    Returns:
        `format` and `dtype` that were read, `documents`, `tokens` and `dtype` written.

    Raises:
        UserError: the input is damaged, an id does not fit the dtype, or the output exists.
    """
    prefix, output = os.fspath(prefix), os.fspath(output)
    if os.path.realpath(prefix) == os.path.realpath(output):
        raise UserError(f"{output} would be read and written at once: give another output")
    if is_finished(output) and not overwrite:
        raise UserError(f"{output}.idx exists already: choose another output, or say --overwrite")
    bin_path, idx_path, _ = store_files(prefix)
    if not idx_path.is_file() or not bin_path.is_file():
        raise UserError(f"{prefix}.idx or .bin does not exist: give the prefix of a token data set")
    with open(idx_path, "rb") as file:
        old = file.read(len(OLD_MAGIC)) == OLD_MAGIC
    info: Mapping[str, Any] | None = None
    if old:
        stored, documents = _old_documents(prefix)
    else:
        store = TokenStore(prefix, dtypes=MEGATRON_DTYPES if megatron_floats else DTYPES)
        stored, info = store.dtype, store.info
        documents = (store.get(i) for i in range(len(store)))
    wanted = _dtype(dtype) if dtype is not None else stored
    kept = Path(f"{prefix}.tokenizer.json")
    with StoreWriter(output, wanted) as writer:
        writer.add_documents(documents)
        answer = {
            "format": "TNTIDX" if old else "MMIDIDX",
            "from_dtype": stored.name,
            "dtype": wanted.name,
            "documents": writer.num_documents,
            "tokens": writer.num_tokens,
        }
        attachments = {".tokenizer.json": kept.read_bytes()} if info is not None and kept.is_file() else None
        writer.finish(info, attachments)
    return answer


def _dtype(name: str) -> np.dtype[Any]:
    known = {dtype.name: dtype for dtype in DTYPES.values()}
    if name not in known:
        raise UserError(f"--dtype {name} is not known: give one of {', '.join(known)}")
    return known[name]


def _old_documents(prefix: str) -> tuple[np.dtype[Any], Iterator[np.ndarray]]:
    """Dtype and items of a TNTIDX data set, whose every number is checked before it is used."""
    bin_path, idx_path, _ = store_files(prefix)
    found, path = idx_path.stat().st_size, idx_path
    with open(path, "rb") as file:
        head = file.read(_OLD_HEADER.size)
    if len(head) < _OLD_HEADER.size:
        raise UserError(f"{path} is truncated: its header takes {_OLD_HEADER.size} bytes; copy it again")
    _, version, code, itemsize, items, num_sizes, num_documents = _OLD_HEADER.unpack(head)
    if version != 1 or code not in DTYPES or DTYPES[code].itemsize != itemsize:
        raise UserError(f"{path} has version {version}, dtype code {code} and {itemsize} bytes: none that is known")
    expected = _OLD_HEADER.size + 8 * (2 * (items + 1) + num_sizes + num_documents)
    if found != expected:
        raise UserError(f"{path} is damaged: {expected} bytes expected for {items} items, {found} found; copy it again")
    index = np.memmap(path, "u1", "r")[_OLD_HEADER.size :].view("<i8")
    dims, offsets = index[: items + 1], index[items + 1 : 2 * items + 2]
    sizes = index[2 * items + 2 : 2 * items + 2 + num_sizes]
    dtype = DTYPES[code]
    total = bin_path.stat().st_size
    if total % itemsize:
        raise UserError(f"{bin_path} is damaged: {total} bytes are no whole number of ids of {itemsize}")
    ids = np.memmap(bin_path, dtype, "r") if total else np.empty(0, dtype)

    def read() -> Iterator[np.ndarray]:
        end = 0
        for start in range(0, items, _PART):
            edges = np.asarray(offsets[start : start + _PART + 1])
            places = np.asarray(dims[start : start + _PART + 1])
            for k in range(len(edges) - 1):
                first, end = int(edges[k]), int(edges[k + 1])
                low, high = int(places[k]), int(places[k + 1])
                one = high - low == 1 and 0 <= low < num_sizes  # items of tokens have one dimension
                if not one or not 0 <= first <= end <= len(ids) or int(sizes[low]) != end - first:
                    raise UserError(f"{path} is damaged: item {start + k} does not lie in {bin_path}; copy both again")
                yield ids[first:end]
        if end != len(ids):
            raise UserError(f"{bin_path} is longer than its index says: {len(ids)} ids, {end} expected")

    return dtype, read()
