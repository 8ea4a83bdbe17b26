"""Text files -> a token data set, in bounded memory and in the order of the input.

    documents ──batches of about a megabyte──> threads: tokenise ──in order──> StoreWriter

The tokenizer runs outside Python's lock, so threads keep all cores busy and nothing is
copied between processes. The output does not depend on the number of workers. What stops
it, a signal or a kill included, leaves nothing that looks finished; running it again gives
the same bytes as an undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import castalia
from castalia.data.read import Document, iter_documents
from castalia.data.store import StoreWriter, is_finished, token_dtype
from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError

_BATCH_SIZE = 1 << 20  # characters in one batch: enough to amortise a call, little to hold
_BATCH_TEXTS = 4096
_PART_SIZE = 1 << 18  # characters; a longer document is tokenised in parts where that is safe


@dataclass(frozen=True)
class Progress:
    """What a progress callback is given, after each batch: totals so far."""

    documents: int
    tokens: int
    bytes: int


class Interrupted(UserError):
    """Stopped by a signal; nothing was left behind (exit code 3)."""

    exit_code = 3


@dataclass
class _Batch:
    """Texts to tokenise together. `ends[k]` is set where text k ends a document: (source, bytes)."""

    texts: list[str] = field(default_factory=list)
    ends: list[tuple[str, int] | None] = field(default_factory=list)


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    tokenizer: Tokenizer,
    text_key: str = "text",
    append_eod: bool = True,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Tokenise texts into PREFIX.bin, PREFIX.idx, PREFIX.json and PREFIX.tokenizer.json.

    Args:
        inputs: files and folders (see `read.iter_documents`), in the order of the output.
        output_prefix: PREFIX.
        tokenizer: makes the ids; a copy of its file is kept beside the data.
        text_key: key of the text in .jsonl files.
        append_eod: end every document with the tokenizer's end-of-document id.
        workers: threads; None: one for each core.
        progress: called now and then with the totals so far.
        overwrite: replace a finished data set under the same prefix.

    Returns:
        The content of PREFIX.json (docs/contracts.md, section 5). `documents` and `bytes`
        count what was stored: a document of no ids is left out.

    Raises:
        UserError: input as in `read.iter_documents`; output that exists; a tokenizer without
            an end-of-document id; no token in all of the input.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    if append_eod and tokenizer.eod is None:
        raise UserError(
            "the tokenizer has no end-of-document token to append: use another, or turn appending off (--no-append-eod)"
        )
    prefix = os.fspath(output_prefix)
    if not os.path.basename(prefix):
        raise UserError(f"the output '{prefix}' names no files: give a prefix such as {os.path.join(prefix, 'tokens')}")
    if is_finished(prefix) and not overwrite:
        raise UserError(f"{prefix}.idx exists already: choose another output, or say --overwrite")
    if not _is_ours(Path(f"{prefix}.json")):
        raise UserError(f"{prefix}.json is no data set's description and would be overwritten: choose another output")
    workers = workers or os.cpu_count() or 1
    ending = np.array([tokenizer.eod] if append_eod else [], token_dtype(tokenizer.vocab_size))
    with _signals_raise(), StoreWriter(output_prefix, ending.dtype) as writer:
        total_bytes = 0
        sources: dict[str, int] = {}
        parts: list[np.ndarray] = []  # of the document that is being put together
        batches = _batches(iter_documents(inputs, text_key), tokenizer)
        with contextlib.closing(_tokenised(batches, tokenizer, workers)) as results:
            for batch, encoded in results:
                for ids, end in zip(encoded, batch.ends, strict=True):
                    parts.append(ids)
                    if end is None:
                        continue
                    document, parts = np.concatenate([*parts, ending]), []
                    source, size = end
                    if source not in sources:
                        sources[source] = os.stat(source).st_size
                    if document.size:
                        writer.add_document(document)
                        total_bytes += size
                if progress is not None:
                    progress(Progress(writer.num_documents, writer.num_tokens, total_bytes))
        if writer.num_tokens == 0:
            raise UserError(f"the {len(sources)} input files hold no text at all: give files with text")
        info = {
            "version": 1,
            "tokenizer": tokenizer.identity(),
            "documents": writer.num_documents,
            "tokens": writer.num_tokens,
            "bytes": total_bytes,
            "append_eod": append_eod,
            "sources": [{"name": Path(name).name, "size": size} for name, size in sources.items()],
            "castalia": castalia.__version__,
        }
        content = tokenizer.file_bytes()
        fingerprint = writer.finish(info, {".tokenizer.json": content} if content is not None else None)
        if content is None:  # a copy that an overwritten data set had is not this one's
            Path(f"{os.fspath(output_prefix)}.tokenizer.json").unlink(missing_ok=True)
    return {**info, "sha256": fingerprint, "bin_sha256": writer.bin_sha256}


def _is_ours(path: Path) -> bool:
    """Whether a file under the name of a data set's description is one, or is not there at all."""
    if not path.exists():
        return True
    try:
        return "documents" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        return False


def _batches(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[_Batch]:
    """Gather texts into batches of bounded size; long documents are cut into parts where allowed."""
    may_cut = getattr(tokenizer, "splits_at_lines", lambda: False)()
    batch, size = _Batch(), 0
    for document in documents:
        parts = cut_at_lines(document.text, _PART_SIZE) if may_cut else iter((document.text,))
        part: str | None = next(parts)
        while part is not None:
            following = next(parts, None)
            batch.texts.append(part)
            batch.ends.append((document.source, document.bytes) if following is None else None)
            size += len(part)
            if size >= _BATCH_SIZE or len(batch.texts) >= _BATCH_TEXTS:
                yield batch
                batch, size = _Batch(), 0
            part = following
    if batch.texts:
        yield batch


def cut_at_lines(text: str, size: int) -> Iterator[str]:
    """Parts of a text of at least `size` characters, cut before newlines between letters."""
    start = 0
    while len(text) - start > size:
        cut = text.find("\n", start + size)
        while cut != -1 and not (text[cut - 1].isalpha() and text[cut + 1 : cut + 2].isalpha()):
            cut = text.find("\n", cut + 1)
        if cut == -1:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _tokenised(
    batches: Iterator[_Batch], tokenizer: Tokenizer, workers: int
) -> Generator[tuple[_Batch, list[np.ndarray]], None, None]:
    """Tokenise batches in threads; results in input order, a bounded number of them at once."""
    dtype = token_dtype(tokenizer.vocab_size)

    def work(batch: _Batch) -> list[np.ndarray]:
        return [np.array(ids, dtype) for ids in tokenizer.encode_batch(batch.texts)]

    pending: deque[tuple[_Batch, Future[list[np.ndarray]]]] = deque()
    # Each thread is one worker, so the tokenizer must not start threads of its own.
    with _environment("TOKENIZERS_PARALLELISM", "false"), ThreadPoolExecutor(workers) as pool:
        try:
            for batch in batches:
                pending.append((batch, pool.submit(work, batch)))
                if len(pending) > 2 * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`, so that clearing up happens; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(
            f"stopped by {signal.Signals(number).name}: no data set was written, and the same command starts afresh"
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
