"""Text files -> documents, one at a time, whatever their packing.

    .txt    the whole file is one document
    .jsonl  one document per line: {"text": "..."}, {"text": ["...", "..."]} or a bare "..."
    each also as .gz and .zst; a folder stands for its files of these kinds, in sorted order

Every fault is named with its file and its line or byte, since corpora are large and mostly
somebody else's.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from castalia.errors import UserError

ENDINGS = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".zst"))
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus.

    Attributes:
        text: the text.
        source: the file it came from.
        number: which document of that file it is, from 0.
        bytes: its length in UTF-8.
    """

    text: str
    source: str
    number: int
    bytes: int


def find_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that the paths stand for; folders are searched to any depth, in sorted order.

    Raises:
        UserError: a path does not exist, has an unknown ending, or is a folder without texts.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(ENDINGS) and p.is_file())
            if not found:
                raise UserError(f"{path} holds no text: no file below it ends in {', '.join(ENDINGS)}")
            files += found
        elif not path.exists():
            raise UserError(f"{path} does not exist: give files or folders of text")
        elif not path.name.endswith(ENDINGS):
            raise UserError(f"{path} has an unknown ending: texts end in {', '.join(ENDINGS)}")
        else:
            files.append(path)
    return files


def iter_documents(paths: Iterable[str | os.PathLike[str]], text_key: str = "text") -> Iterator[Document]:
    """Read the documents of files and folders, in the order given.

    A .jsonl file is read line by line; only one document is in memory at a time. Empty texts
    are left out, as by GPT-NeoX's reader; they keep their number.

    Raises:
        UserError: see `find_files`; or a file is no UTF-8, no JSON, lacks `text_key`, is damaged;
            or there is no document at all.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    count = 0
    files = find_files(paths)
    for path in files:
        inner = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
        texts = _jsonl_texts(path, text_key) if inner.suffix == ".jsonl" else _whole_text(path)
        for number, (text, size) in enumerate(texts):
            if text:
                yield Document(text, str(path), number, size)
                count += 1
    if count == 0:
        names = ", ".join(map(str, files)) or "nothing"
        raise UserError(f"there is no document in {names}: give at least one file with text")


def _whole_text(path: Path) -> Iterator[tuple[str, int]]:
    with _open(path) as file:
        content = _guarded_read(path, file)
    yield _decode(content, path, 0), len(content)


def _jsonl_texts(path: Path, text_key: str) -> Iterator[tuple[str, int]]:
    offset = 0
    with _open(path) as file:
        for line_number, line in enumerate(_guarded_lines(path, file), start=1):
            start, offset = offset, offset + len(line)
            if line_number == 1 and line.startswith(_BOM):
                line, start = line[len(_BOM) :], len(_BOM)
            if not line.strip():
                continue
            where = f"{path}:{line_number}"
            try:
                value = json.loads(_decode(line, path, start))
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not valid JSON ({error.msg}, column {error.colno})") from None
            except RecursionError:
                raise UserError(f"{where} is nested too deeply to be a document") from None
            text = _text_of(value, text_key, where)
            try:
                size = len(text.encode())
            except UnicodeEncodeError:
                raise UserError(f"{where} holds half of a surrogate pair, which is not valid text") from None
            yield text, size


def _text_of(value: Any, text_key: str, where: str) -> str:
    """The text of one line: an object's field, its list of strings joined by blank lines, or a string."""
    if isinstance(value, dict):
        if text_key not in value:
            keys = ", ".join(map(str, value)) or "none"
            raise UserError(f"{where} has no key {text_key!r} (keys found: {keys}): name the key with --text-key")
        value = value[text_key]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return "\n\n".join(value)
    if not isinstance(value, str):
        raise UserError(
            f"{where} holds a {type(value).__name__} where a text was expected: each line is an object whose "
            f"{text_key!r} is a string or a list of strings; another key can be named with --text-key"
        )
    return value


def _decode(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        packed = " of its unpacked content" if path.suffix in (".gz", ".zst") else ""
        raise UserError(
            f"{path} is not UTF-8 at byte {offset + error.start}{packed} "
            f"(0x{content[error.start]:02x}): convert it, for example with iconv"
        ) from None


# -- packings --------------------------------------------------------------------------------

_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path} is damaged or truncated ({error}): fetch or compress it again")


def _guarded_read(path: Path, file: IO[bytes]) -> bytes:
    try:
        return file.read()
    except _DAMAGE as error:
        raise _damaged(path, error) from None


def _guarded_lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from file
    except _DAMAGE as error:
        raise _damaged(path, error) from None


def _open(path: Path) -> IO[bytes]:
    try:
        raw = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if path.suffix == ".gz":
        return io.BufferedReader(_Owning(gzip.GzipFile(fileobj=raw), raw), 1 << 20)
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(raw), 1 << 20)
    return raw


class _Owning(io.RawIOBase):
    """A gzip stream that closes the file below it."""

    def __init__(self, stream: gzip.GzipFile, raw: IO[bytes]) -> None:
        self._stream, self._raw = stream, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Zstandard(io.RawIOBase):
    """A zstandard stream of any number of frames that notices a missing end.

    The package's own reader takes a truncated frame for the end of the data.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raw.close()
            raise UserError(
                f"{raw.name} is zstandard-compressed, which needs a package: pip install zstandard"
            ) from None
        self._raw = raw
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame = self._new()
        self._inside = False  # a frame has begun and not ended
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._raw.read(1 << 17)
            if not self._packed:
                if self._inside:
                    raise EOFError("the last frame has no end")
                return 0
            self._inside = True
            try:
                self._plain = memoryview(self._frame.decompress(self._packed))
            except self._error as error:
                raise EOFError(str(error)) from None
            self._packed = b""
            if self._frame.eof:
                self._packed, self._inside, self._frame = self._frame.unused_data, False, self._new()
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
