"""A tokenizer.json of Hugging Face's `tokenizers`: GPT-NeoX-20B's, and most others.

    tokenizer.json ──> HFTokenizer ──> ids, and what each id weighs in bytes

`token_bytes` makes bits per byte exact: a loss in nats, summed over tokens, can be divided by the
bytes that those very tokens stand for. Where a tokenizer loses or adds text, so that no such
table is right, there is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from castalia.data.tokenizer import lossless
from castalia.data.tokenizer.base import EOD_NAMES
from castalia.errors import UserError


class HFTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`.

    Truncation and padding that the file may ask for are switched off.

    Args:
        content: the file's content; its SHA-256 is the tokenizer's identity.
        name: what to call it in error messages.

    Raises:
        UserError: the content is no such file.
    """

    kind = "hf"

    def __init__(self, content: bytes, name: str = "tokenizer.json") -> None:
        import tokenizers

        self._content = content
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises plain Exception
            raise UserError(f"{name} is not a tokenizer.json of Hugging Face's tokenizers ({error})") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps; every id needs its row of the embedding.
        self.vocab_size: int = max(len(ids), max(ids.values(), default=-1) + 1)
        self.eod: int | None = next((ids[name] for name in EOD_NAMES if name in ids), None)
        self.unknown: int | None = ids.get(getattr(self.tokenizer.model, "unk_token", None) or "")

    def __reduce__(self) -> tuple[type[HFTokenizer], tuple[bytes]]:
        return HFTokenizer, (self._content,)

    @cached_property
    def state(self) -> dict[str, Any]:
        """The file's content, parsed, without truncation and padding; what it leaves out is None."""
        defaults = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
        return {**defaults, "added_tokens": [], **self._parsed, "truncation": None, "padding": None}

    @cached_property
    def _parsed(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._content)
        return content

    def plain_file(self) -> str:
        """The file without truncation and padding."""
        changed = any(self._parsed.get(part) is not None for part in ("truncation", "padding"))
        return json.dumps(self.state) if changed else self._content.decode()

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._content).hexdigest()
        return {"type": self.kind, "sha256": digest, "vocab_size": self.vocab_size, "eod": self.eod}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def token_bytes(self) -> np.ndarray | None:
        """Bytes of each id, for byte-level vocabularies and those that fall back to bytes; else None.

        A table is given only where every text comes back from its ids: not with WordPiece or an
        unknown token in use, a normaliser that changes more than NFC does, white space thrown
        away, or a space put in front (`add_prefix_space`). With NFC, as in GPT-NeoX-20B's file,
        the bytes are those of the normalised text.
        """
        if not lossless.is_lossless(self.state):
            return None
        added = self.tokenizer.get_added_tokens_decoder()
        length = lossless.byte_level_length if self.is_byte_level() else lossless.piece_length
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items():
            if i not in added:
                sizes[i] = length(token)
            elif not added[i].special:
                sizes[i] = len(added[i].content.encode())
        return sizes

    def file_bytes(self) -> bytes | None:
        return self._content

    def special_tokens(self) -> dict[str, int]:
        added = self.tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    def is_byte_level(self) -> bool:
        """Whether vocabulary entries are spelled in GPT-2's alphabet of bytes."""
        return lossless.names_type(self.state["decoder"], "ByteLevel")

    def splits_at_lines(self) -> bool:
        """Whether a text may be cut before a newline between two letters without changing its ids.

        So it is with the pre-tokenisation of GPT-2 and those derived from it, which never
        join a newline to a letter before or after it. NFC does not reach across a newline
        either. Used to tokenise a long text in parts.
        """
        state = self.state
        stages = lossless.flatten(state["pre_tokenizer"])
        level = stages[0] if len(stages) == 1 else {}
        return (
            (state["normalizer"] is None or state["normalizer"].get("type") == "NFC")
            and level.get("type") == "ByteLevel"
            and level.get("use_regex", True)
            and not level.get("add_prefix_space")
            and not any(
                token["lstrip"] or token["rstrip"] or "\n" in token["content"] for token in state["added_tokens"]
            )
        )
