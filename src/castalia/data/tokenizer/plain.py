"""Tokenizers without a vocabulary: an id for each byte of the UTF-8 text.

"byte"  ids 0..255 are bytes, 256 ends a document
"char"  GPT-NeoX's CharLevelTokenizer: 512 ids, 0 ends a document, 1 pads; ids are bytes as well
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class ByteTokenizer:
    """One id for each byte of the UTF-8 text, and 256 for the end of a document."""

    kind = "byte"
    vocab_size = 257
    eod: int | None = 256

    def identity(self) -> dict[str, Any]:
        return {"type": self.kind, "sha256": None, "vocab_size": self.vocab_size, "eod": self.eod}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [text.encode() for text in texts]
        return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(part) for part in encoded], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray | None:
        return np.array([1] * 256 + [0], np.int32)

    def file_bytes(self) -> bytes | None:
        return None

    def special_tokens(self) -> dict[str, int]:
        return {"<end of document>": 256}


class CharTokenizer(ByteTokenizer):
    """GPT-NeoX's CharLevelTokenizer: the ids of UTF-8 bytes in a vocabulary of 512.

    A byte 0 in a text has the id that ends documents, so there is no exact table of bytes.
    Decoding gives the text back, where GPT-NeoX's turns newlines and all beyond ASCII into others.
    """

    kind = "char"
    vocab_size = 512
    eod: int | None = 0

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if 1 < i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray | None:
        return None

    def special_tokens(self) -> dict[str, int]:
        return {"<end of document>": 0, "<padding>": 1}
