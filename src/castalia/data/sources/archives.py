"""Archives -> their members, one after another, without unpacking anything to disk.

    .tar, .tar.gz, .tar.xz, .tar.zst   read once from front to back, in the archive's order
    .zip                               in the order of its directory

A member is one document, whatever its name ends in, unless it is called .jsonl, .json, .csv,
.dat, .tar or .zip (packed or not) and then is what its name says. What `tarfile` takes for an end of the
archive though it is damage, or grows without bounds, is refused here.
"""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any

from castalia.data.sources.blocks import damaged
from castalia.data.sources.unpack import READ_ERRORS, Plain, Stream
from castalia.errors import UserError

DEPTH = 3  # archives within archives
_ZIP_END = 22  # bytes of a .zip's last record, without the comment
_HEADER_LIMIT = 1 << 20  # bytes of one extended header: names, times
_EXTENDED = frozenset({
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
})  # fmt: skip


class _Header(tarfile.TarInfo):
    """A member's header that tells damage from the archive's end, which `TarFile.next` does not."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            text = str(error) if buf else "the mark at the end of the archive is missing"
            raise tarfile.ReadError(text) from None
        if header.size < 0 or (header.type in _EXTENDED and header.size > _HEADER_LIMIT):
            raise tarfile.ReadError(f"a header gives a size of {header.size:,} bytes")
        return header


def tar_members(stream: Stream, name: str) -> Iterator[tuple[str, Stream]]:
    """Name and content of each regular member; a content must be read before the next is asked for."""
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, bufsize=1 << 16) as archive:  # type: ignore[call-overload]
            before = -1
            while (member := archive.next()) is not None:
                archive.members = []  # else they gather in memory
                if member.size < 0 or archive.offset <= before:
                    raise tarfile.ReadError("a header points backwards")
                before = archive.offset
                if member.isreg():
                    content = archive.extractfile(member)
                    where = f"{name}!{member.name}"
                    yield member.name, Plain(content, where, None if member.issparse() else member.size)
                elif not member.isdir() and not (member.issym() or member.islnk()):
                    raise tarfile.ReadError(f"{member.name!r} is no file, folder or link")
            _drain(stream)
    except UserError:
        raise
    except READ_ERRORS as error:
        raise damaged(name, error) from None


def _drain(stream: Stream) -> None:
    """Read to the end, so that what packs the archive checks its sum."""
    while stream.read(1 << 20):
        pass


def zip_members(file: Any, name: str) -> Iterator[tuple[str, Stream]]:
    """Name and content of each member of a seekable .zip."""
    try:
        with zipfile.ZipFile(file) as archive:
            _check_directory(file, archive)
            for member in archive.infolist():
                if member.filename.endswith("/") and not member.file_size:
                    continue
                where = f"{name}!{member.filename}"
                if member.flag_bits & 1:
                    raise UserError(f"{where} is encrypted: unpack the archive with its password first")
                if not member.file_size:
                    _check_empty(file, member)
                with archive.open(member) as content:
                    yield member.filename, Plain(content, where, member.file_size)
    except UserError:
        raise
    except (*READ_ERRORS, LookupError, struct.error, MemoryError) as error:
        raise damaged(name, error) from None


def _check_empty(file: Any, member: zipfile.ZipInfo) -> None:
    """Hold an empty member against its own header (APPNOTE 4.3.7: 30 bytes), since nothing has a checksum of 0."""
    file.seek(member.header_offset)
    header = file.read(30)
    later = int.from_bytes(header[6:8], "little") & 8  # sum and sizes stand behind the data
    packs = member.compress_type != zipfile.ZIP_STORED
    if header[14:18] != bytes(4) or (packs and not member.compress_size) or (later and member.compress_size > 2):
        raise zipfile.BadZipFile(f"{member.filename!r} is empty in the directory and is not")


def _check_directory(file: Any, archive: zipfile.ZipFile) -> None:
    """Hold the members that `zipfile` found against the number that the archive's end gives.

    The end is APPNOTE 4.3.16: 22 bytes and a comment; the number lies 10 bytes in, and is
    65535 where a longer record holds it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _ZIP_END - len(archive.comment)))
    end = file.read(_ZIP_END)
    announced = int.from_bytes(end[10:12], "little")
    found = len(archive.infolist())
    if announced not in (found, found & 0xFFFF, 0xFFFF) or (announced == 0xFFFF) > (found >= 0xFFFF):
        raise zipfile.BadZipFile(f"its end announces {announced:,} members, its directory lists {found:,}")
    if not found and size > _ZIP_END + len(archive.comment):
        raise zipfile.BadZipFile("its directory is empty, and the file is not")
