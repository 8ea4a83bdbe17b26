"""Held-out text -> what general compressors make of it, in bits per byte.

A language model's bits per byte is the size to which it could compress the text by
arithmetic coding, so xz and zstd are its natural yardsticks. Two figures for each:

    alone                 size(valid)                          the compressor knows nothing beforehand
    given training text   size(train + valid) - size(train)    it has read what the model has read

The second is by difference for both, with a window that spans everything. A raw-content
dictionary for zstd was tried as well and came out 0.2 % worse on 11 MB of prose, so the
difference is the stronger opponent. Neither counts the size of the model or of the
training text: it says what was learnt, not what a file would weigh.
"""

from __future__ import annotations

import importlib.util
import lzma
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol

from castalia.errors import UserError

# Limits of the two formats' windows: liblzma's largest dictionary is 1.5 GiB, zstd's largest window 2 GiB.
_XZ_WINDOW = (64 << 20, 1536 << 20)
_ZSTD_WINDOW_LOG = (23, 31)


_PIECE = 1 << 18
"""Bytes after which a compressor looks at the clock."""


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _TooLate(Exception):
    """There was not time enough."""


def _size(compressor: _Compressor, text: bytes, deadline: float) -> int:
    """Bytes that come out; the text goes in piece by piece, since a thread cannot be ended from outside."""
    size = 0
    for at in range(0, len(text), _PIECE):
        if time.monotonic() > deadline:
            raise _TooLate
        size += len(compressor.compress(text[at : at + _PIECE]))
    return size + len(compressor.flush())


def xz_size(text: bytes, deadline: float = float("inf")) -> int:
    """Bytes of `xz -9`, with the dictionary widened beyond preset 9's 64 MiB if the text is longer."""
    low, high = _XZ_WINDOW
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(max(low, len(text)), high)}]
    return _size(lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters), text, deadline)


def zstd_size(text: bytes, deadline: float = float("inf")) -> int:
    """Bytes of `zstd -19`, with the window widened beyond level 19's 8 MiB if the text is longer."""
    import zstandard

    low, high = _ZSTD_WINDOW_LOG
    window_log = min(max(low, max(len(text) - 1, 1).bit_length()), high)
    level = zstandard.ZstdCompressionParameters.from_level(19, source_size=len(text), window_log=window_log)
    return _size(zstandard.ZstdCompressor(compression_params=level).compressobj(size=len(text)), text, deadline)


def compression_bits_per_byte(
    train: bytes, valid: bytes, seconds: float = float("inf"), say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Compress held-out text with xz -9 and zstd -19, each alone and having seen the training text.

    Args:
        train: UTF-8 bytes of the training text, documents concatenated.
        valid: the same of the unseen text.
        seconds: a row whose compressor is not done by then is left out.
        say: takes a line for people about each compression that is done, or was given up.

    Returns:
        `{"train_bytes", "valid_bytes", "rows": [{"name", "bits_per_byte", "note"}, ...]}`, the shape of a
        run's `comparison.json`. zstd's rows are absent when the `zstandard` package is not installed.

    Raises:
        UserError: `valid` is empty.
    """
    if not valid:
        raise UserError("there is no held-out text to compress: give at least one validation document")
    sizes: dict[str, Callable[[bytes, float], int]] = {"xz -9": xz_size}
    if importlib.util.find_spec("zstandard") is not None:
        sizes["zstd -19"] = zstd_size
    texts = {"the unseen text": valid, "the training text": train, "both": train + valid}
    began = time.monotonic()
    size_of: dict[tuple[str, str], int] = {}
    # Both libraries release the GIL, so two threads halve the wait; more would only cost memory
    # (xz -9 takes some 700 MB each).
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = {
            pool.submit(size, text, began + seconds): (name, part)
            for part, text in texts.items()
            for name, size in sizes.items()
        }
        for job in as_completed(jobs):
            name, part = jobs[job]
            took = f"{name} of {part} ({len(texts[part]) / 1e6:.2f} MB)"
            try:
                size_of[name, part] = job.result()
                took += f" took until {time.monotonic() - began:.0f} s"
            except _TooLate:
                took += f" is left out: not done in {seconds:.0f} s"
            if say is not None:
                say(took)
    rows = []
    for name in sizes:
        alone, before, after = (size_of.get((name, part)) for part in texts)
        given = None if before is None or after is None else after - before
        for size, note in ((alone, "alone"), (given, "given the training text")):
            if size is not None:
                rows.append({"name": name, "bits_per_byte": 8 * size / len(valid), "note": note})
    return {"train_bytes": len(train), "valid_bytes": len(valid), "rows": rows}
