"""Inputs -> numbered blocks -> documents.

txt ───────────────── whole files, many small ones to a block
jsonl, csv, json, dat ── cut
tar, zip ── members ── each of them as above; archives within archives too
parquet, arrow ─────── columns
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from castalia.data.sources.archives import DEPTH, tar_members, zip_members
from castalia.data.sources.blocks import Block, Document, Gatherer, SourceOptions, damaged
from castalia.data.sources.cut import cut, whole
from castalia.data.sources.inputs import Input, find_inputs, is_url, kind_of, open_input
from castalia.data.sources.parse import parse
from castalia.data.sources.tables import table_blocks
from castalia.data.sources.unpack import Plain, Stream, close, unpacked
from castalia.errors import UserError

BLOCK_SIZE = 1 << 22
Paths = Iterable[str | os.PathLike[str]] | str | os.PathLike[str]


def iter_blocks(
    inputs: Paths, options: SourceOptions | None = None, block_size: int = BLOCK_SIZE, skip: int = 0
) -> Iterator[Block]:
    """Cut the inputs into blocks, in the order given.

    Args:
        inputs: files, folders, globs, URLs, "-" for standard input.
        options: how texts are found.
        block_size: bytes of a block, about; the last of a file is smaller, and one whose
            document is larger is larger.
        skip: so many blocks are read but not given, to go on where an earlier reading stopped.

    Raises:
        UserError: an input is missing, unknown, damaged or truncated.
    """
    options = options or SourceOptions()
    for number, block in enumerate(_blocks(find_inputs(inputs, options), options, block_size)):
        if number >= skip:
            yield dataclasses.replace(block, number=number)


def iter_documents(inputs: Paths, text_key: str = "text", options: SourceOptions | None = None) -> Iterator[Document]:
    """Read the documents of the inputs, in order; `options` rather than `text_key` for anything more.

    Raises:
        UserError: as `iter_blocks` and `documents_of`; or there is no document at all.
    """
    options = options or SourceOptions(text_key=text_key)
    count = 0
    for block in iter_blocks(inputs, options):
        for document in parse(block, options):
            yield document
            count += 1
    if count == 0:
        names = ", ".join(i.name for i in find_inputs(inputs, options)) or "nothing"
        raise UserError(f"there is no document in {names}: give at least one file with text")


def _blocks(items: list[Input], options: SourceOptions, block_size: int) -> Iterator[Block]:
    files = Gatherer("files", "", block_size)
    for item in items:
        if item.kind == "txt":
            raw = open_input(item)
            try:
                block = files.add(whole(_content(raw, item), item.name, options), item.name)
            finally:
                close(raw)
            if block:
                yield block
            continue
        if block := files.flush():
            yield block
        raw = open_input(item)
        try:
            yield from _file(raw, item, options, block_size)
        finally:
            if item.name != "-":
                close(raw)
    if block := files.flush():
        yield block


def _content(raw: Any, item: Input) -> Stream:
    name = "standard input" if item.name == "-" else item.name
    return unpacked(Plain(raw, name, item.size, is_url(item.name)), item.packing, name)


def _file(raw: Any, item: Input, options: SourceOptions, block_size: int) -> Iterator[Block]:
    if item.kind in ("parquet", "arrow"):
        yield from table_blocks(_seekable(raw), item.kind, item.name, options, block_size)
    elif item.kind in ("tar", "zip"):
        members = Gatherer("members", item.name, block_size)
        stream = _seekable(raw) if item.kind == "zip" else _content(raw, item)
        yield from _archive(stream, item.kind, item.name, "", members, options, block_size, DEPTH)
        if block := members.flush():
            yield block
    else:
        yield from cut(_content(raw, item), item.kind, item.name, "", options, block_size)


def _archive(
    stream: Any,
    kind: str,
    source: str,
    within: str,
    texts: Gatherer,
    options: SourceOptions,
    block_size: int,
    depth: int,
) -> Iterator[Block]:
    name = f"{source}!{within}" if within else source
    if depth == 0:
        raise damaged(name, f"archives lie in archives more than {DEPTH} deep")
    for member, content in (tar_members if kind == "tar" else zip_members)(stream, name):
        inner = f"{within}!{member}" if within else member
        member_kind, packing = kind_of(member) or ("txt", "")
        if member_kind in ("lines", "parquet", "arrow"):
            member_kind, packing = "txt", packing if member_kind == "lines" else ""
        content = unpacked(content, packing, f"{source}!{inner}")
        if member_kind == "txt":
            if block := texts.add(whole(content, f"{source}!{inner}", options), inner):
                yield block
            continue
        if block := texts.flush():
            yield block
        if member_kind == "tar":
            yield from _archive(content, "tar", source, inner, texts, options, block_size, depth - 1)
        elif member_kind == "zip":
            with _spooled(content) as file:
                yield from _archive(file, "zip", source, inner, texts, options, block_size, depth - 1)
        else:
            yield from cut(content, member_kind, source, inner, options, block_size)


def _seekable(raw: Any) -> Any:
    return raw if raw.seekable() else _spooled(raw)


def _spooled(stream: Stream) -> Any:
    """A stream's content as a file that can be read in any order; on disk where it is large."""
    file = tempfile.SpooledTemporaryFile(1 << 24)  # noqa: SIM115 (the caller closes it)
    for part in iter(lambda: stream.read(1 << 20), b""):
        file.write(part)
    file.seek(0)
    return file
