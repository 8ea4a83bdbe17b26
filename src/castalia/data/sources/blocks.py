"""What passes between reading and parsing: options, blocks and documents.

A block is some megabytes of a corpus, cut where documents end. It can be pickled, and holds
what its parser needs to name a fault's place: file, member, line, byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from castalia.errors import UserError

FORMS = ("NFC", "NFD", "NFKC", "NFKD")


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How texts are found in the inputs, and what is done to them.

    Attributes:
        text_key: key (.json, .jsonl) or column (.csv, .parquet, .arrow) of the text.
        ftfy: mend wrongly decoded text with ftfy.fix_text, as GPT-NeoX's --ftfy.
        normalise: Unicode normalisation form (see `FORMS`), after ftfy; None: none.
        stdin: what standard input holds, as the ending of a file's name without the first dot,
            such as "jsonl", "txt" or "jsonl.zst".
        max_document: bytes (unpacked) of the largest document that is taken for one. Memory
            follows the largest document, so this keeps a packed file of absurd content from filling it.
    """

    text_key: str = "text"
    ftfy: bool = False
    normalise: str | None = None
    stdin: str = "jsonl"
    max_document: int = 1 << 30

    def __post_init__(self) -> None:
        if self.normalise is not None and self.normalise not in FORMS:
            raise UserError(f"unknown Unicode normalisation '{self.normalise}'; known: {', '.join(FORMS)}")


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus.

    Attributes:
        text: the text.
        source: the input it came from, as `describe_inputs` names it.
        number: its place there, from 0: the line (.jsonl, .csv), row, record or member.
        bytes: its length in UTF-8.
        member: the archive's member that it came from, or "".
    """

    text: str
    source: str
    number: int
    bytes: int
    member: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a corpus that holds whole documents.

    Attributes:
        number: running number over all inputs, from 0.
        source: the input it came from; for `files` the first of them.
        kind: how `data` is laid out: `jsonl`, `csv` (records without the header), `lines` (each
            a document), or texts and JSON values of the given `lengths`, one after another:
            `files` and `members` (with a name for each), `texts` and `values` (without).
        data: the bytes.
        first: place of the first document in its source or member, from 0 (see `Document.number`).
        offset: byte of `data`'s begin in the unpacked source or member.
        member: the archive's member, where the block comes from one.
        lengths: bytes of each text.
        names: name of each text's file or member.
        header: the first record of a .csv file.
    """

    number: int
    source: str
    kind: str
    data: bytes
    first: int = 0
    offset: int = 0
    member: str = ""
    lengths: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    header: bytes = b""


def place(source: str, member: str = "") -> str:
    """The name of a file, or of a member in an archive, for messages."""
    return f"{source}!{member}" if member else source


def damaged(name: str, what: object) -> UserError:
    """The error of a file whose packing or format is broken."""
    text = " ".join(str(what).split()) or type(what).__name__
    return UserError(f"{name} is damaged or truncated ({text[:300].rstrip('.')}): fetch or write it again")


def too_big(name: str, limit: int) -> NoReturn:
    """Raise the error of a document over the limit."""
    raise UserError(
        f"{name} holds a single document of more than {limit:,} bytes: it is not what its name says, "
        "or should be cut into documents first"
    )


@dataclass(slots=True)
class Gatherer:
    """Gathers small texts into blocks of at least `block_size` bytes."""

    kind: str
    source: str
    block_size: int
    first: int = 0
    member: str = ""
    _texts: list[bytes] = field(default_factory=list)
    _lengths: list[int] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _size: int = 0

    def add(self, text: bytes, name: str = "", lengths: list[int] | None = None) -> Block | None:
        """Take a text, or several of the given lengths; returns a block when there is enough for one."""
        if not self._names and self.kind == "files":
            self.source = name
        self._texts.append(text)
        self._lengths += [len(text)] if lengths is None else lengths
        if self.kind in ("files", "members"):
            self._names.append(name)
        self._size += len(text)
        full = self._size >= self.block_size or len(self._lengths) >= 1 << 16
        return self.flush() if full else None

    def flush(self) -> Block | None:
        """What is left as a block, or None."""
        if not self._lengths:
            return None
        block = Block(
            -1,
            self.source,
            self.kind,
            b"".join(self._texts),
            first=self.first,
            member=self.member,
            lengths=tuple(self._lengths),
            names=tuple(self._names),
        )
        self.first += 0 if self.kind == "files" else len(self._lengths)
        self._texts, self._lengths, self._names, self._size = [], [], [], 0
        return block
