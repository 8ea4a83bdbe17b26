"""SentencePiece models (.model), through the package `sentencepiece`.

The end of a document is the piece `<|endoftext|>`, as in GPT-NeoX's SPMTokenizer, or, where the
model has none (GPT-NeoX then took the unknown token), the model's own end of sentence.
SentencePiece normalises text and mostly puts a space in front, so there is no table of bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from castalia.errors import UserError


class SentencePieceTokenizer:
    """A .model file of SentencePiece.

    Args:
        content: the file's content; its SHA-256 is the tokenizer's identity.
        name: what to call it in error messages.

    Raises:
        UserError: the content is no such file, or the package is missing.
    """

    kind = "sentencepiece"

    def __init__(self, content: bytes, name: str = "the model") -> None:
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                f"{name} is read as a SentencePiece model, which needs a package: pip install 'castalia[sentencepiece]'"
            ) from None
        self._content = content
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            if not content or not self.model.LoadFromSerializedProto(content):
                raise RuntimeError("empty")
        except (RuntimeError, ValueError):
            raise UserError(f"{name} is neither a tokenizer.json nor a SentencePiece model: name another") from None
        self.vocab_size: int = self.model.get_piece_size()
        self.unknown: int | None = self.model.unk_id() if self.model.unk_id() >= 0 else None
        own = self.model.piece_to_id("<|endoftext|>")
        end = own if self.model.id_to_piece(own) == "<|endoftext|>" else self.model.eos_id()
        self.eod: int | None = end if end >= 0 else None

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes]]:
        return SentencePieceTokenizer, (self._content,)

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._content).hexdigest()
        return {"type": self.kind, "sha256": digest, "vocab_size": self.vocab_size, "eod": self.eod}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.encode(text, out_type=int)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.model.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.model.decode([int(i) for i in ids])
        return text

    def token_bytes(self) -> np.ndarray | None:
        return None

    def file_bytes(self) -> bytes | None:
        return self._content

    def special_tokens(self) -> dict[str, int]:
        return {self.model.id_to_piece(i): i for i in range(self.vocab_size) if self.model.is_control(i)}
