"""Blocks -> documents: the part of reading that takes time, for any thread or process.

A line is parsed by orjson, at several hundred megabytes per second. What orjson refuses is
given to Python's own parser, which takes more (NaN and numbers of any size beside the text)
and says better what is wrong. A text with half of a surrogate pair is refused by both: it has
no UTF-8. Every fault is named with its file and its line, value or byte.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import orjson

from castalia.data.sources.blocks import Block, Document, SourceOptions, place
from castalia.errors import UserError

_BOM = b"\xef\xbb\xbf"
_CONVERT = "convert it, for example with iconv"


def documents_of(block: Block, options: SourceOptions) -> list[Document]:
    """The documents of a block. Empty texts are left out, as by GPT-NeoX's reader; they keep their number.

    Raises:
        UserError: something there is no UTF-8, no JSON or CSV, or lacks `options.text_key`.
    """
    return list(parse(block, options))


def parse(block: Block, options: SourceOptions) -> Iterator[Document]:
    """As `documents_of`, one at a time, so that a fault does not keep the documents before it back."""
    if options.ftfy or options.normalise:
        clean = _cleaner(options)
        for document in _PARSERS[block.kind](block, options):
            text = clean(document.text)
            if text:
                yield Document(text, document.source, document.number, utf8_size(text), document.member)
    else:
        yield from _PARSERS[block.kind](block, options)


def utf8_size(text: str) -> int:
    """Bytes of a text in UTF-8, without encoding it where that is not needed."""
    return len(text) if text.isascii() else len(text.encode())


def _cleaner(options: SourceOptions) -> Any:
    mend: Any = None
    if options.ftfy:
        try:
            import ftfy

            mend = ftfy.fix_text
        except ImportError:
            raise UserError("mending text needs a package: pip install 'castalia[ftfy]'") from None
    form: Any = options.normalise

    def clean(text: str) -> str:
        if mend is not None:
            text = mend(text)
        return unicodedata.normalize(form, text) if form and not text.isascii() else text

    return clean


# -- kinds -----------------------------------------------------------------------------------


def _jsonl(block: Block, options: SourceOptions) -> Iterator[Document]:
    key, source, member = options.text_key, block.source, block.member
    offset = block.offset
    for number, line in enumerate(block.data.split(b"\n"), start=block.first):
        start, offset = offset, offset + len(line) + 1
        if start == 0 and line.startswith(_BOM):
            line, start = line[len(_BOM) :], len(_BOM)
        try:
            value = orjson.loads(line)
            text = value[key] if type(value) is dict else value
        except (orjson.JSONDecodeError, KeyError):
            if not line.strip():
                continue
            value = _with_python(line, source, member, f":{number + 1}", start)
            text = None
        if type(text) is not str:
            text = _text_of(value, key, f"{place(source, member)}:{number + 1}")
        if text:
            yield Document(text, source, number, utf8_size(text), member)


def _values(block: Block, options: SourceOptions) -> Iterator[Document]:
    for number, item in enumerate(_slices(block), start=block.first):
        where = f", value {number}"
        try:
            value = orjson.loads(item)
        except orjson.JSONDecodeError:
            value = _with_python(bytes(item), block.source, block.member, where, None)
        text = _text_of(value, options.text_key, f"{place(block.source, block.member)}{where}")
        if text:
            yield Document(text, block.source, number, utf8_size(text), block.member)


def _with_python(line: bytes, source: str, member: str, where: str, start: int | None) -> Any:
    name = place(source, member)
    text = _decode(line, name, start, where if start is None else "")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}{where} is not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{name}{where} is nested too deeply to be a document") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{name}{where} is not valid JSON ({error})") from None


def _text_of(value: Any, key: str, where: str) -> str:
    """The text of one value: an object's field, its list of strings joined by blank lines, or a string."""
    if isinstance(value, dict):
        if key not in value:
            keys = ", ".join(map(str, value)) or "none"
            raise UserError(f"{where} has no key {key!r} (keys found: {keys}): name the key with --text-key")
        value = value[key]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = "\n\n".join(value)
    if not isinstance(value, str):
        raise UserError(
            f"{where} holds a {type(value).__name__} where a text was expected: each line is an object whose "
            f"{key!r} is a string or a list of strings; another key can be named with --text-key"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where} holds half of a surrogate pair, which is not valid text") from None
    return value


def _lines(block: Block, options: SourceOptions) -> Iterator[Document]:
    """A document on each line, newline included, as lm_dataformat reads a .gz of no other kind."""
    offset = block.offset
    for number, line in enumerate(io.BytesIO(block.data), start=block.first):
        text = _decode(line, place(block.source, block.member), offset)
        offset += len(line)
        if text:
            yield Document(text, block.source, number, len(line), block.member)


def _texts(block: Block, options: SourceOptions) -> Iterator[Document]:
    name = place(block.source, block.member)
    for number, item in enumerate(_slices(block), start=block.first):
        if item:
            text = _decode(item, name, 0, f", text {number}")
            yield Document(text, block.source, number, len(item), block.member)


def _files(block: Block, options: SourceOptions) -> Iterator[Document]:
    for name, item in zip(block.names, _slices(block), strict=True):
        if item:
            yield Document(_decode(item, name, 0), name, 0, len(item))


def _members(block: Block, options: SourceOptions) -> Iterator[Document]:
    for number, (name, item) in enumerate(zip(block.names, _slices(block), strict=True), start=block.first):
        if item:
            yield Document(_decode(item, place(block.source, name), 0), block.source, number, len(item), name)


def _csv(block: Block, options: SourceOptions) -> Iterator[Document]:
    name = place(block.source, block.member)
    csv.field_size_limit(options.max_document + 1)  # its default is 128 KiB, less than many documents
    header = _rows(block.header, name, 0, 0)
    columns = next((row for _, row in header), [])
    key = options.text_key
    if columns.count(key) != 1:
        raise UserError(
            f"{name} has {'several columns' if key in columns else 'no column'} {key!r} "
            f"(columns found: {', '.join(columns) or 'none'}): name the column with --text-key"
        )
    column = columns.index(key)
    for line, row in _rows(block.data, name, block.first, block.offset):
        if not row:
            continue  # an empty line
        if len(row) != len(columns):
            raise UserError(
                f"{name}:{line + 1} has {len(row)} fields where the header has {len(columns)}: "
                "mend the quotes or commas of that record"
            )
        if text := row[column]:
            yield Document(text, block.source, line, utf8_size(text), block.member)


def _rows(data: bytes, name: str, first: int, offset: int) -> Iterator[tuple[int, list[str]]]:
    """Line of each record's begin, from 0, and its fields."""
    reader = csv.reader(io.StringIO(_decode(data, name, offset), newline=""), strict=True)
    line = 0
    try:
        for row in reader:
            yield first + line, row
            line = reader.line_num
    except csv.Error as error:
        raise UserError(f"{name}:{first + line + 1} is not valid CSV ({error}): mend that record") from None


_PARSERS = {
    "jsonl": _jsonl,
    "values": _values,
    "lines": _lines,
    "texts": _texts,
    "files": _files,
    "members": _members,
    "csv": _csv,
}


def _slices(block: Block) -> Iterator[bytes]:
    start = 0
    for length in block.lengths:
        yield block.data[start : start + length]
        start += length


def _decode(content: bytes, name: str, offset: int | None, where: str = "") -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = (offset or 0) + error.start
        packed = " of its unpacked content" if name.endswith((".gz", ".zst", ".xz")) else ""
        raise UserError(
            f"{name}{where} is not UTF-8 at byte {byte}{packed} (0x{content[error.start]:02x}): {_CONVERT}"
        ) from None
