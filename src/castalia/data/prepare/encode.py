"""Documents -> arrays of ids, by the quickest encoder that proves equal to the plain one.

    texts ──cut where safe──> FastEncoder (fastokens) or the tokenizer itself ──> ids, ends

`fastokens` gives the ids of Hugging Face's `tokenizers` some thirty times quicker. That is not
taken on trust: a sample of the very corpus is encoded both ways at the start of each run, and
parts of later blocks as well.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from castalia.data.tokenizer import HFTokenizer, Tokenizer, encode_flat
from castalia.errors import UserError

PART_SIZE = 1 << 18  # characters; a longer document is tokenised in parts where that is safe
FEW_ADDED = 8  # added tokens up to so many cost little to find
PROOF_SIZE = 1 << 17  # characters of the sample that is encoded twice
PROOF_INTERVAL = 128  # every so many blocks, a sample of one is encoded twice


class FastEncoder:
    """A tokenizer.json in `fastokens`. One thread for each call: the workers are the parallelism.

    Finding added tokens is most of the work with a vocabulary such as GPT-NeoX-20B's, which has two
    dozen runs of blanks. Texts that hold none of them are given to a copy without them, which is
    made when a batch has many.
    """

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self._state = tokenizer.state
        known_to = {token.content: i for i, token in tokenizer.tokenizer.get_added_tokens_decoder().items()}
        if known_to != {token["content"]: token["id"] for token in self._state["added_tokens"]}:
            raise ValueError("tokenizers gives added tokens other ids than the file says")
        self._whole = self._make(tokenizer.plain_file())
        added = [token["content"] for token in self._state["added_tokens"]]
        # What holds an added token also holds the shortest one within it.
        self._needles = [a for a in added if not any(b in a for b in added if b != a)]
        # Another normaliser than NFC may make an added token of what is none.
        known = (self._state["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        self._separate = known and len(added) > FEW_ADDED and 0 < len(self._needles) <= FEW_ADDED
        self._bare: Any = None

    @staticmethod
    def _make(content: str) -> Any:
        with environment("FASTOKENS_BPE_THREADS", "1"), environment("RAYON_NUM_THREADS", "1"):
            import fastokens

            return fastokens.Tokenizer.from_json_str(content)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [total] uint32, ends int64 [len(texts)]."""
        if not self._separate:
            return self._encode(self._whole, texts)
        # NFC may bring an added token together, but only where there is something to compose.
        bare = [text.isascii() and not any(needle in text for needle in self._needles) for text in texts]
        if 2 * sum(bare) < len(bare):
            return self._encode(self._whole, texts)
        if self._bare is None:
            self._bare = self._make(json.dumps({**self._state, "added_tokens": []}))
        if all(bare):
            return self._encode(self._bare, texts)
        parts: list[np.ndarray] = [np.empty(0, np.uint32)] * len(texts)
        for which, encoder in ((True, self._bare), (False, self._whole)):
            chosen = [k for k, one in enumerate(bare) if one == which]
            ids, ends = self._encode(encoder, [texts[k] for k in chosen])
            for k, part in zip(chosen, np.split(ids, ends[:-1]), strict=True):
                parts[k] = part
        return np.concatenate(parts), np.cumsum([part.size for part in parts], dtype=np.int64)

    @staticmethod
    def _encode(encoder: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = encoder.encode_batch_flat(list(texts))
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8")[1:].astype(np.int64)


class Encoder:
    """A tokenizer with the quickest way to its ids.

    Args:
        tokenizer: says what the ids are.
        choice: "auto": the fast way where there is one; "plain": the tokenizer itself.

    Attributes:
        name: the way that is used: a package, or `numpy`.
    """

    def __init__(self, tokenizer: Tokenizer, choice: str = "auto") -> None:
        self.tokenizer = tokenizer
        self.fast: FastEncoder | None = None
        self.name = {"hf": "tokenizers", "byte": "numpy", "char": "numpy"}.get(tokenizer.kind, tokenizer.kind)
        self._may_cut = getattr(tokenizer, "splits_at_lines", lambda: False)()
        if choice == "auto" and isinstance(tokenizer, HFTokenizer):
            try:
                self.fast = FastEncoder(tokenizer)
                self.name = "fastokens"
            except Exception:  # not installed, or a vocabulary of a kind that it does not know
                self.fast = None

    def plain(self) -> None:
        """Use the tokenizer itself from now on."""
        self.fast, self.name = None, {"hf": "tokenizers"}.get(self.tokenizer.kind, self.tokenizer.kind)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [total] and ends int64 [len(texts)] of documents."""
        # Only the tokenizer itself needs much more memory than the text.
        if self.fast is None and self._may_cut and any(len(text) > PART_SIZE for text in texts):
            parts = [list(cut_at_lines(text, PART_SIZE)) for text in texts]
            ids, ends = self._whole([part for document in parts for part in document])
            return ids, ends[np.cumsum([len(document) for document in parts]) - 1]
        return self._whole(texts)

    def _whole(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self.fast.encode_flat(texts) if self.fast is not None else encode_flat(self.tokenizer, texts)

    def prove(self, texts: Sequence[str]) -> tuple[int, int | None]:
        """Encode a sample both ways.

        Returns:
            How many documents were compared, and the place in `texts` of one whose ids differ, or None.
        """
        if self.fast is None or not texts:
            return 0, None
        chosen: list[int] = []
        size, stride = 0, max(1, len(texts) // 64)
        for k in range(0, len(texts), stride):
            if chosen and size + len(texts[k]) > PROOF_SIZE:
                continue
            chosen.append(k)
            size += len(texts[k])
        sample = [texts[k][: 4 * PROOF_SIZE] for k in chosen]
        ids, ends = self.encode(sample)
        plain = self.tokenizer.encode_batch(sample)
        for k, part, other in zip(chosen, np.split(ids, ends[:-1]), plain, strict=True):
            if part.tolist() != other:
                return len(chosen), k
        return len(chosen), None


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


def disagreement(source: str, number: int) -> UserError:
    """The error of a document that the fast encoder cuts otherwise than `tokenizers`."""
    return UserError(
        f"{source}, document {number}: fastokens gives other ids than tokenizers, though it agreed at the start; "
        "nothing of this run is to be trusted: run it again with --restart --encoder plain"
    )


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """An environment variable that is set for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
