"""A block of a corpus -> what is appended to each output: ids and the sizes of documents.

    Block ──documents_of──> texts ──Encoder──> ids + end of document ──> Part for PREFIX
                                                   └─ masked to the pattern ──> Part for PREFIX_label

A recipe says which data sets come of one pass and makes their parts; it is all that a worker,
thread or process, needs to have. `chat.py` has the one for conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from castalia.data.prepare.encode import PROOF_INTERVAL, Encoder, disagreement
from castalia.data.sources import Block, SourceOptions, documents_of
from castalia.data.store import token_dtype
from castalia.data.tokenizer import Tokenizer

IGNORED = -100  # the label of a token that no loss is taken on


@dataclass(frozen=True, slots=True)
class Output:
    """A data set that comes of the pass.

    Attributes:
        suffix: what its prefix has after the run's prefix.
        dtype: of its ids.
        is_ids: whether it holds ids of the tokenizer (and not labels or rewards).
    """

    suffix: str
    dtype: np.dtype[Any]
    is_ids: bool = True


@dataclass(slots=True)
class Part:
    """What a block adds to one output: ids of whole documents end to end, their sizes, bytes of text."""

    ids: np.ndarray
    sizes: np.ndarray
    bytes: int


@dataclass(slots=True)
class Parts:
    """What a block adds to all outputs; `proved` documents of it were encoded both ways."""

    parts: list[Part]
    proved: int = 0


@dataclass
class TextRecipe:
    """Texts under one or several keys; every document is its ids and the end of document.

    Attributes:
        tokenizer: makes the ids.
        options: how texts are found.
        keys: one output each; with one alone its suffix is "".
        append_eod: whether documents end with the tokenizer's end-of-document id.
        pattern: ids up to and including the first occurrence of which are masked in the labels; empty: no labels.
        encoder: "auto" or "plain".
    """

    tokenizer: Tokenizer
    options: SourceOptions
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = True
    pattern: tuple[int, ...] = ()
    encoder: str = "auto"
    _encoder: Encoder | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}  # built anew where it is unpickled

    @property
    def quick(self) -> Encoder:
        """The encoder, built when first asked for."""
        if self._encoder is None:
            self._encoder = Encoder(self.tokenizer, self.encoder)
        return self._encoder

    def outputs(self) -> list[Output]:
        """The data sets that are made."""
        dtype = np.dtype("<i4") if self.pattern else token_dtype(self.tokenizer.vocab_size)
        found = []
        for key in self.keys:
            suffix = f"_{key}" if len(self.keys) > 1 else ""
            found.append(Output(suffix, dtype))
            if self.pattern:
                found.append(Output(f"{suffix}_label", dtype, is_ids=False))
        return found

    def describe(self) -> dict[str, Any]:
        """Everything that the output depends on besides the inputs, as JSON."""
        return {
            "recipe": "text",
            "tokenizer": self.tokenizer.identity(),
            "options": {name: getattr(self.options, name) for name in self.options.__dataclass_fields__},
            "keys": list(self.keys),
            "append_eod": self.append_eod,
            "pattern": list(self.pattern),
        }

    def sample(self, block: Block) -> list[str]:
        """Texts of a block, for the proof."""
        return [document.text for document in documents_of(block, replace(self.options, text_key=self.keys[0]))]

    def encode(self, block: Block) -> Parts:
        """The parts of a block, one for each output."""
        done = Parts([])
        dtype = self.outputs()[0].dtype
        for key in self.keys:
            documents = documents_of(block, replace(self.options, text_key=key))
            texts = [document.text for document in documents]
            ids, ends = self.quick.encode(texts)
            if block.number % PROOF_INTERVAL == PROOF_INTERVAL - 1:
                count, wrong = self.quick.prove(texts)
                done.proved += count
                if wrong is not None:
                    raise disagreement(documents[wrong].source, documents[wrong].number)
            eod = self.tokenizer.eod if self.append_eod else None
            whole, sizes = with_ending(ids, ends, eod, dtype)
            kept = sizes > 0
            lengths = np.array([document.bytes for document in documents], np.int64)
            part = Part(whole, sizes[kept], int(lengths[kept].sum()))
            done.parts.append(part)
            if self.pattern:
                done.parts.append(Part(masked(part.ids, part.sizes, self.pattern), part.sizes, part.bytes))
        return done


def with_ending(
    ids: np.ndarray, ends: np.ndarray, eod: int | None, dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end -> the same with `eod` behind each, and their sizes.

    Args:
        ids: [total].
        ends: [documents], where in `ids` each ends.
        eod: None: nothing is put behind them.
        dtype: of the result.

    Raises:
        UserError: an id does not fit the dtype.
    """
    from castalia.errors import UserError

    sizes = np.diff(ends, prepend=0).astype(np.int32)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= np.iinfo(dtype).max:
        raise UserError(
            f"a token id does not fit {dtype.name}, the dtype for the tokenizer's vocabulary size: check it"
        )
    if eod is None:
        return ids.astype(dtype), sizes
    whole = np.empty(ids.size + len(ends), dtype)
    places = ends + np.arange(len(ends))
    keep = np.ones(whole.size, bool)
    keep[places] = False
    whole[keep] = ids
    whole[places] = eod
    return whole, sizes + 1


def masked(ids: np.ndarray, sizes: np.ndarray, pattern: Sequence[int]) -> np.ndarray:
    """Labels: the ids, but -100 in each document up to and including the first occurrence of a pattern.

    A document without it keeps all its ids, as with GPT-NeoX's --mask-before-token.
    """
    labels = ids.copy()
    wanted = np.asarray(pattern, ids.dtype)
    length = len(wanted)
    if len(ids) < length:
        return labels
    hits = np.ones(len(ids) - length + 1, bool)
    for k, one in enumerate(wanted):
        hits &= ids[k : len(ids) - length + 1 + k] == one
    places = np.flatnonzero(hits)
    ends = np.cumsum(sizes.astype(np.int64))
    for start, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True):
        k = int(np.searchsorted(places, start))
        if k < len(places) and places[k] + length <= end:
            labels[start : places[k] + length] = IGNORED
    return labels
