"""Packed streams -> plain bytes, in bounded memory, with every missing end noticed.

A stream has `read(n)`: n bytes, or fewer at its end and only there. gzip, xz and zstandard
files may consist of several parts one after another; each must be whole. What a few packed
bytes can grow into at once is bounded, so that a file made to fill memory does not.
"""

from __future__ import annotations

import contextlib
import lzma
import tarfile
import zipfile
import zlib
from typing import Any, Protocol

from castalia.data.sources.blocks import damaged
from castalia.errors import UserError

PACKINGS = (".gz", ".zst", ".xz")
_STEP = 1 << 20  # bytes that one step of a decompressor gives
_XZ_MEMORY = 1 << 30
_ZSTD_WINDOW = 1 << 31  # zstd --long=31, which large public dumps use

# What reading a broken or unreachable file may raise; the last two are zipfile's for encryption and rare methods.
READ_ERRORS = (
    OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile,
    RuntimeError, NotImplementedError,
)  # fmt: skip


class Stream(Protocol):
    """Something to read from."""

    def read(self, size: int, /) -> bytes:
        """`size` bytes, or fewer at the end."""
        ...


class Plain:
    """A file as it is. Faults become sentences; one that is shorter than was announced is noticed."""

    def __init__(self, raw: Any, name: str, size: int | None = None, remote: bool = False) -> None:
        self._raw, self._name, self._expected = raw, name, size
        self._errors = (Exception,) if remote else READ_ERRORS  # each store has errors of its own
        self._count = 0

    def read(self, size: int, /) -> bytes:
        parts = []
        while size > 0:
            try:
                part = self._raw.read(size)
            except UserError:
                raise
            except self._errors as error:
                raise damaged(self._name, error) from None
            if not part:
                if self._expected is not None and self._count < self._expected:
                    raise damaged(self._name, f"it ends after {self._count:,} of {self._expected:,} bytes")
                break
            parts.append(part)
            size -= len(part)
            self._count += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Unpacked:
    """A packed stream's plain content."""

    def __init__(self, raw: Stream, packing: str, name: str) -> None:
        self._raw, self._packing, self._name = raw, packing, name
        self._errors: tuple[type[Exception], ...] = (zlib.error, lzma.LZMAError, MemoryError)
        if packing == ".zst":
            self._zstandard = _zstandard(name)
            self._errors += (self._zstandard.ZstdError,)
        self._frame = self._new()
        self._inside = True  # a part has begun and not ended: even an empty file packs to something
        self._packed = b""
        self._plain = memoryview(b"")
        self._piece = 1 << 9  # packed bytes that zstandard is given at once

    def read(self, size: int, /) -> bytes:
        parts = []
        while size > 0:
            if not self._plain and not self._fill():
                break
            part, self._plain = self._plain[:size], self._plain[size:]
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _new(self) -> Any:
        if self._packing == ".gz":
            return zlib.decompressobj(31)
        if self._packing == ".xz":
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        return self._zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()

    def _fill(self) -> bool:
        """Unpack some more; False at the end."""
        while not self._plain:
            wants = self._packing != ".xz" or self._frame.needs_input
            if wants and not self._packed:
                self._packed = self._raw.read(self._piece if self._packing == ".zst" else 1 << 16)
            if not self._inside:
                if self._packing != ".zst":  # both may be padded with zeros
                    self._packed = self._packed.lstrip(b"\0") if self._packed else b""
                    if not self._packed:
                        self._packed = self._raw.read(1 << 16)
                        if self._packed:
                            continue
                if not self._packed:
                    return False
                self._frame, self._inside = self._new(), True
            at_end = wants and not self._packed
            try:
                plain = self._step(wants)
            except self._errors as error:
                raise damaged(self._name, error) from None
            if at_end and not plain and not self._frame.eof:
                raise damaged(self._name, "the packed data has no end")
            self._plain = memoryview(plain)
            if self._frame.eof:
                self._packed, self._inside = self._frame.unused_data + self._packed, False
        return True

    def _step(self, wants: bool) -> bytes:
        if self._packing == ".gz":
            plain = self._frame.decompress(self._packed, _STEP)
            self._packed = self._frame.unconsumed_tail
        elif self._packing == ".xz":
            plain = self._frame.decompress(self._packed if wants else b"", _STEP)
            self._packed = b"" if wants else self._packed
        else:
            plain = self._frame.decompress(self._packed)
            self._packed = b""
            # A zstandard block of 4 bytes can stand for 128 KiB, and all of a piece is unpacked at once.
            self._piece = 1 << 6 if len(plain) > _STEP else min(1 << 13, 2 * self._piece)
        return bytes(plain)


def unpacked(raw: Stream, packing: str, name: str) -> Stream:
    """The plain content of a stream; `packing` is one of `PACKINGS` or ""."""
    return Unpacked(raw, packing, name) if packing else raw


def read_all(stream: Stream, limit: int) -> bytes | None:
    """All that is left of a stream; None where that is more than `limit` bytes."""
    parts, size = [], 0
    while part := stream.read(1 << 20):
        parts.append(part)
        size += len(part)
        if size > limit:
            return None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _zstandard(name: str) -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{name} is zstandard-compressed, which needs a package: pip install zstandard") from None
    return zstandard


def close(raw: Any) -> None:
    """Close a file of any origin; that it cannot be closed well matters to nobody who only reads."""
    with contextlib.suppress(*READ_ERRORS):
        raw.close()
