"""Archives -> their members, one after another, without unpacking anything to disk.

    .tar, .tar.gz, .tar.xz, .tar.zst   read once from front to back, in the archive's order
    .zip                               in the order of its directory

A member is one document, whatever its name ends in, unless it is called .jsonl, .json, .csv,
.dat, .tar or .zip (packed or not) and then is what its name says. What `tarfile` takes for an end of the
archive though it is damage, or grows without bounds, is refused here.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any

from castalia.data.sources.blocks import damaged
from castalia.data.sources.unpack import READ_ERRORS, Plain, Stream
from castalia.errors import UserError

DEPTH = 3  # archives within archives
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
            for member in archive.infolist():
                if member.is_dir():
                    continue
                where = f"{name}!{member.filename}"
                if member.flag_bits & 1:
                    raise UserError(f"{where} is encrypted: unpack the archive with its password first")
                with archive.open(member) as content:
                    yield member.filename, Plain(content, where, member.file_size)
    except UserError:
        raise
    except (*READ_ERRORS, KeyError) as error:
        raise damaged(name, error) from None
