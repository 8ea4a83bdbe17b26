"""Streams of bytes -> blocks, cut where documents end.

    jsonl, lines   after the last newline of so many bytes
    csv            after the last newline outside quotes (their number so far is even)
    json           after a value: elements of an array, or values one after another
    dat            lm_dataformat's records: 16 digits that give the length, then the text
    txt            nowhere

A document that is larger than a block makes its block larger. Lines are only looked for, and
parsed later (see `parse`); of the kinds here only .json is parsed twice.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator

from castalia.data.sources.blocks import Block, Gatherer, SourceOptions, place, too_big
from castalia.data.sources.unpack import Stream, read_all
from castalia.errors import UserError

_BOM = b"\xef\xbb\xbf"
_LENGTH_DIGITS = 16  # of a record in lm_dataformat's .dat


def cut(
    stream: Stream, kind: str, source: str, member: str, options: SourceOptions, block_size: int
) -> Iterator[Block]:
    """The blocks of one file or member, not yet numbered; `kind` as `inputs.kind_of` says, .txt excepted."""
    if kind == "json":
        return _json(stream, source, member, options, block_size)
    if kind == "dat":
        return _records(stream, source, member, options, block_size)
    return _lines(stream, kind, source, member, options, block_size)


def whole(stream: Stream, name: str, options: SourceOptions) -> bytes:
    """A stream's content as one document."""
    content = read_all(stream, options.max_document)
    return too_big(name, options.max_document) if content is None else content


def _lines(
    stream: Stream, kind: str, source: str, member: str, options: SourceOptions, block_size: int
) -> Iterator[Block]:
    line, offset = 0, 0
    rest = b""
    header = b""
    at_end = False
    while not at_end or rest:
        wanted = block_size
        data, end, at_end = rest, 0, at_end
        parts = [rest]
        while not end:
            more = stream.read(max(1, wanted - len(data)))
            at_end = len(more) < max(1, wanted - len(data))
            parts.append(more)
            data = b"".join(parts)
            end = len(data) if at_end else _bound(data, kind)
            if not end and len(data) > options.max_document:
                too_big(f"{place(source, member)}:{line + 1}", options.max_document)
            if at_end:
                break
            parts, wanted = [data], 2 * len(data)  # doubling, so that a long document costs no more than it must
        data, rest = data[:end], data[end:]
        if not data:
            return
        if kind == "csv" and not offset:
            cut_at = _first_record(data)
            header, body = data[:cut_at].removeprefix(_BOM), data[cut_at:]
            lines = data[:cut_at].count(b"\n")
            if body:
                yield Block(-1, source, kind, body, lines, cut_at, member, header=header)
        else:
            yield Block(-1, source, kind, data, line, offset, member, header=header)
        line += data.count(b"\n")
        offset += len(data)


def _bound(data: bytes, kind: str) -> int:
    """Where to cut: behind the last newline that ends a document, or 0."""
    end = data.rfind(b"\n") + 1
    if kind != "csv" or not end:
        return end
    odd = data.count(b'"', 0, end) % 2
    while end and odd:
        before = data.rfind(b"\n", 0, end - 1) + 1
        odd ^= data.count(b'"', before, end) % 2
        end = before
    return end


def _first_record(data: bytes) -> int:
    end = data.find(b"\n") + 1
    while end and data.count(b'"', 0, end) % 2:
        end = data.find(b"\n", end) + 1
    return end or len(data)


def _records(stream: Stream, source: str, member: str, options: SourceOptions, block_size: int) -> Iterator[Block]:
    name = place(source, member)
    texts = Gatherer("texts", source, block_size, member=member)
    number = 0
    while digits := stream.read(_LENGTH_DIGITS):
        if len(digits) < _LENGTH_DIGITS or not digits.isdigit():
            raise UserError(
                f"{name}, record {number}: {digits!r} is no length of {_LENGTH_DIGITS} digits: "
                "the file is damaged or truncated, or no .dat of lm_dataformat"
            )
        if int(digits) > options.max_document:
            too_big(f"{name}, record {number}", options.max_document)
        text = stream.read(int(digits))
        if len(text) < int(digits):
            raise UserError(
                f"{name}, record {number}: {len(text):,} of {int(digits):,} bytes are there: the file is truncated"
            )
        if block := texts.add(text):
            yield block
        number += 1
    if block := texts.flush():
        yield block


class _Window:
    """The text of a stream from a moving position on; keeps what is not yet used up."""

    def __init__(self, stream: Stream, name: str) -> None:
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._fed = 0
        self.text, self.position, self.at_end = "", 0, False

    def more(self, size: int) -> None:
        """Read on, and drop what lies before the position."""
        data = self._stream.read(size)
        self.at_end = len(data) < size
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final=self.at_end)
        except UnicodeDecodeError as error:
            at = self._fed - pending + error.start
            raise UserError(
                f"{self._name} is not UTF-8 at byte {at} (0x{error.object[error.start]:02x}): "
                "convert it, for example with iconv"
            ) from None
        self._fed += len(data)
        self.text, self.position = self.text[self.position :] + text, 0

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end; moves to it."""
        while True:
            text, at = self.text, self.position
            while at < len(text) and text[at] in " \t\r\n":
                at += 1
            self.position = at
            if at < len(text):
                return text[at]
            if self.at_end:
                return ""
            self.more(1 << 16)


def _json(stream: Stream, source: str, member: str, options: SourceOptions, block_size: int) -> Iterator[Block]:
    name = place(source, member)
    window = _Window(stream, name)
    window.more(1 << 16)
    window.text = window.text.removeprefix("\ufeff")
    values = Gatherer("values", source, block_size, member=member)
    is_array = window.peek() == "["
    window.position += is_array
    number = 0
    while True:
        following = window.peek()
        if is_array and following == "]" and number == 0:
            window.position += 1
            break
        if not following and not is_array:
            break
        start, end = _value(window, f"{name}, value {number}", options.max_document)
        text = window.text[start:end].encode("utf-8", "surrogatepass")
        number += 1
        if block := values.add(text):
            yield block
        if is_array:
            following = window.peek()
            if following not in (",", "]"):
                raise UserError(
                    f"{name}, value {number - 1} has neither a comma nor the array's end behind it: "
                    "the file is damaged or truncated"
                )
            window.position += 1
            if following == "]":
                break
    if window.peek():
        raise UserError(f"{name} goes on after its array has ended: give one array, or values without an array")
    if block := values.flush():
        yield block


def _value(window: _Window, where: str, limit: int) -> tuple[int, int]:
    """Begin and end of the next JSON value in the window's text; moves behind it."""
    while True:
        start = window.position
        fault: json.JSONDecodeError | None = None
        try:
            _, end = json.JSONDecoder().raw_decode(window.text, start)
        except json.JSONDecodeError as error:
            fault, end = error, len(window.text)
        except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
            raise UserError(f"{where} is nested too deeply, or holds too long a number, to be a document") from None
        # A fault away from the end is none that more text could mend; a number may go on behind it.
        certain = fault is not None and fault.pos < len(window.text) - 16 and not fault.msg.startswith("Unterminated")
        if (fault is None and end < len(window.text)) or window.at_end or certain:
            if fault is not None:
                raise UserError(
                    f"{where} is not valid JSON ({fault.msg} after {fault.pos - start} characters of it)"
                ) from None
            window.position = end
            return start, end
        if len(window.text) - start > limit:
            too_big(where, limit)
        window.more(max(1 << 16, len(window.text) - start))
