"""What the rest of the library asks of a tokenizer, and the ids of many texts as one array.

    texts ──encode_flat──> ids [total], ends [texts]

Lists of Python integers cost more than the tokenising itself once an encoder is quick, so the
preparation asks for arrays; a tokenizer that has no quicker way is asked for its lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer.

    Attributes:
        kind: the name it is registered under.
        vocab_size: number of ids, unpadded, added tokens included.
        eod: id that ends a document, or None.
    """

    kind: str
    vocab_size: int
    eod: int | None

    def identity(self) -> dict[str, Any]:
        """`type`, `sha256` of its file (None without one), `vocab_size`, `eod`."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens added."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self) -> np.ndarray | None:
        """int32 [vocab_size]: UTF-8 bytes that each id stands for, 0 for special tokens.

        None where the bytes of a text's ids need not add up to those of the text.
        """

    def file_bytes(self) -> bytes | None:
        """The tokenizer's file, to keep beside the data; None where there is none."""


def encode_flat(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of several texts, end to end.

    Returns:
        ids [total], of an integer dtype that holds them; ends int64 [len(texts)], where in `ids` each text ends.
    """
    quick = getattr(tokenizer, "encode_flat", None)
    if quick is not None:
        ids, ends = quick(texts)
        return ids, ends
    lists = tokenizer.encode_batch(texts)
    ends = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
    total = int(ends[-1]) if lists else 0
    return np.fromiter((i for ids in lists for i in ids), np.int64, total), ends


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Names and ids of the tokens that stand for no text, as far as the tokenizer tells."""
    tell = getattr(tokenizer, "special_tokens", None)
    return dict(tell()) if tell is not None else {}
