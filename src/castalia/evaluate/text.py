"""Documents -> nats, perplexity and bits per byte, by document, by domain and in all.

    document ──encode──> [prefix t0 t1 ...] ──windows of seq_length, moved by stride──> requests ──score──> nats

Each document is scored by itself, its first token from the end-of-document id, as each began in
training; so a document's number does not depend on its neighbours. Bits per byte divide by the
bytes of the text as it was given, and therefore compare between tokenizers.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from castalia.data.sources import Document, SourceOptions, iter_documents
from castalia.errors import UserError
from castalia.evaluate.score import Progress, Request, rolling_requests
from castalia.evaluate.subject import Subject

_AT_ONCE = 512  # documents whose requests are sorted by length together


@dataclass(frozen=True)
class DocumentScore:
    """How well a model predicts one document.

    Attributes:
        source, number: where it came from, as castalia.data.sources names it.
        domain: what it is counted under.
        tokens, bytes: scored tokens, and UTF-8 bytes of the text.
        nll: their summed negative log-likelihood, in nats.
        whole: its ids give the text back, but for Unicode's composition (NFC), so that bits per byte are earned.
    """

    source: str
    number: int
    domain: str
    tokens: int
    bytes: int
    nll: float
    whole: bool = True

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"bits_per_byte": self.bits_per_byte}


def read_texts(
    inputs: Sequence[str], text_key: str = "text", domain: str | None = None
) -> Iterator[tuple[Document, str]]:
    """Documents with the domain that each counts under.

    Args:
        inputs: files, folders, globs, URLs (docs/sources.md).
        text_key: key or column of the text.
        domain: key or column that names it; None: the file.

    Raises:
        UserError: there is no document, or one has no such key.
    """
    if domain is None:
        for document in iter_documents(inputs, text_key):
            yield document, document.source
        return
    if "-" in inputs:
        raise UserError("--by reads the texts twice, which standard input cannot be: put them into a file")
    # The reader gives one field of a record, so the field that names the domain is read beside it.
    names = iter_documents(inputs, options=SourceOptions(text_key=domain))
    table = {(d.source, d.member, d.number): d.text for d in names}
    for document in iter_documents(inputs, text_key):
        place = document.source, document.member, document.number
        if place not in table:
            raise UserError(f"{document.source}: document {document.number} has no {domain!r}: name another field")
        yield document, table[place]


def score_texts(
    subject: Subject,
    texts: Iterable[tuple[Document, str]],
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[DocumentScore]:
    """Score documents, each by itself; those without a token are left out.

    Args:
        subject: the model.
        texts: see `read_texts`.
        stride: tokens that each window but a document's first scores; None: half of the model's length.
        batch_size: windows of a forward pass.
        progress: called with (windows scored, windows known so far).

    Raises:
        UserError: the stride does not fit, or there is nothing to score.
    """
    length = subject.max_length
    stride = stride or max(1, length // 2)
    if not 1 <= stride <= length:
        raise UserError(f"stride {stride} must lie between 1 and the model's length {length}")
    scores: list[DocumentScore] = []
    rest = iter(texts)
    while chunk := list(islice(rest, _AT_ONCE)):
        encoded = subject.tokenizer.encode_batch([document.text for document, _ in chunk])
        requests: list[Request] = []
        owners: list[int] = []
        for number, ids in enumerate(encoded):
            windows = list(rolling_requests(ids, subject.prefix, length, stride))
            requests += windows
            owners += [number] * len(windows)
        nll = [0.0] * len(chunk)
        for owner, result in zip(owners, subject.score(requests, batch_size, progress), strict=True):
            nll[owner] -= result.logprob
        scores += [
            DocumentScore(
                document.source,
                document.number,
                domain,
                len(ids),
                document.bytes,
                sum_,
                _same(document.text, subject.tokenizer.decode(ids)),
            )
            for (document, domain), ids, sum_ in zip(chunk, encoded, nll, strict=True)
            if ids
        ]
    if not scores:
        raise UserError("the texts hold no token to score: give some with text")
    return scores


def _same(text: str, decoded: str) -> bool:
    return text == decoded or unicodedata.normalize("NFC", text) == decoded


def summary(scores: Sequence[DocumentScore]) -> dict[str, Any]:
    """Sums over documents: tokens, bytes, nats per token, perplexity, bits per byte.

    Bits per byte are None where the tokenizer loses part of a text, as they would flatter it.
    """
    tokens, size, nll = (sum(getattr(s, name) for s in scores) for name in ("tokens", "bytes", "nll"))
    return {
        "documents": len(scores),
        "tokens": tokens,
        "bytes": size,
        "nll": nll,
        "loss": nll / tokens,
        "perplexity": math.exp(min(nll / tokens, 700.0)),
        "bits_per_byte": nll / math.log(2) / size if all(s.whole for s in scores) else None,
    }


def by_domain(scores: Sequence[DocumentScore]) -> dict[str, dict[str, Any]]:
    """`summary` of each domain, in the order of their first documents."""
    domains: dict[str, list[DocumentScore]] = {}
    for entry in scores:
        domains.setdefault(entry.domain, []).append(entry)
    return {name: summary(found) for name, found in domains.items()}
