"""tiktoken's encodings by name, and its rank files (.tiktoken), through the package `tiktoken`.

    "cl100k_base" ──package, its cache or the network──┐
    FILE.tiktoken: lines of base64(bytes) and rank ────┴─> ranks, pattern, special tokens ─> one JSON file

A rank file holds neither the regular expression that cuts words nor the special tokens; they
are those of a known encoding, told by the number of ranks or named by the user. What is kept
beside the data is complete in itself, so that no run needs the network again.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from castalia.errors import UserError

_END = "<|endoftext|>"
_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"""
    r"""\s*[\r\n]|\s+(?!\S)|\s"""
)
_UPPER, _LOWER, _SHORT = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SHORT}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SHORT}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_MIDDLE = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
# Encoding -> number of ranks, pattern, special tokens: as tiktoken's own definitions have them.
ENCODINGS: dict[str, tuple[int, str, dict[str, int]]] = {
    "gpt2": (50256, _GPT2, {_END: 50256}),
    "r50k_base": (50256, _GPT2, {_END: 50256}),
    "p50k_base": (50280, _GPT2, {_END: 50256}),
    "cl100k_base": (100256, _CL100K, {_END: 100257, **_MIDDLE}),
    "o200k_base": (199998, _O200K, {_END: 199999, "<|endofprompt|>": 200018}),
}


class TiktokenTokenizer:
    """An encoding of tiktoken. Special tokens in a text are ordinary text (GPT-NeoX refused them).

    Args:
        content: as `complete_file` makes it; its SHA-256 is the tokenizer's identity.
        name: what to call it in error messages.

    Raises:
        UserError: the content is damaged, or the package is missing.
    """

    kind = "tiktoken"

    def __init__(self, content: bytes, name: str = "the tokenizer") -> None:
        tiktoken = _package(name)
        self._content = content
        try:
            state = json.loads(content)["tiktoken"]
            ranks = {base64.b64decode(entry): rank for rank, entry in state["ranks"]}
            self.encoding = tiktoken.Encoding(
                state["name"], pat_str=state["pattern"], mergeable_ranks=ranks, special_tokens=state["special_tokens"]
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name} is a damaged tokenizer of tiktoken's kind ({error}): copy it again") from None
        self._ranks = ranks
        self._specials: dict[str, int] = dict(state["special_tokens"])
        self.vocab_size: int = self.encoding.n_vocab
        self.eod: int | None = self._specials.get(_END)

    def __reduce__(self) -> tuple[type[TiktokenTokenizer], tuple[bytes]]:
        return TiktokenTokenizer, (self._content,)

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._content).hexdigest()
        return {"type": self.kind, "sha256": digest, "vocab_size": self.vocab_size, "eod": self.eod}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.encoding.encode_ordinary(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return np.concatenate([np.empty(0, np.uint32), *parts]), np.cumsum([p.size for p in parts], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.encoding.decode([int(i) for i in ids], errors="replace")
        return text

    def token_bytes(self) -> np.ndarray | None:
        if not all(bytes([byte]) in self._ranks for byte in range(256)):
            return None
        sizes = np.zeros(self.vocab_size, np.int32)
        for entry, rank in self._ranks.items():
            sizes[rank] = len(entry)
        sizes[list(self._specials.values())] = 0
        return sizes

    def file_bytes(self) -> bytes | None:
        return self._content

    def special_tokens(self) -> dict[str, int]:
        return dict(self._specials)


def complete_file(name: str, pattern: str, special_tokens: dict[str, int], ranks: dict[bytes, int]) -> bytes:
    """The file that a tokenizer of this kind is kept in: everything that makes its ids."""
    entries = [[rank, base64.b64encode(entry).decode()] for entry, rank in sorted(ranks.items(), key=lambda x: x[1])]
    state = {"name": name, "pattern": pattern, "special_tokens": special_tokens, "ranks": entries}
    return json.dumps({"tiktoken": state}).encode()


def load_encoding(name: str) -> TiktokenTokenizer:
    """An encoding that the package knows; its ranks come from the package's cache or the network.

    Raises:
        UserError: the package or the encoding is not known, or the ranks cannot be had.
    """
    tiktoken = _package(name)
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(sorted(tiktoken.list_encoding_names()))
        raise UserError(f"tiktoken knows no encoding {name!r}: give one of {known}")
    try:
        found = tiktoken.get_encoding(name)
    except Exception as error:  # of requests, which is not ours to import
        raise UserError(
            f"the ranks of tiktoken's {name} cannot be had ({type(error).__name__}): connect once, set "
            f"TIKTOKEN_CACHE_DIR to a folder that holds them, or name a .tiktoken file"
        ) from None
    ranks, specials = found._mergeable_ranks, found._special_tokens
    return TiktokenTokenizer(complete_file(name, found._pat_str, specials, ranks), name)


def load_ranks(content: bytes, name: str, encoding: str | None = None) -> TiktokenTokenizer:
    """A rank file, with the pattern and special tokens of `encoding`, or of the known one with as many ranks.

    Raises:
        UserError: the file is no rank file, or the encoding is not known.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry, rank = line.split()
            ranks[base64.b64decode(entry, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{name}:{number} is no rank of tiktoken's, which are base64 and a number") from None
    if encoding is None:
        encoding = next((known for known, (count, _, _) in ENCODINGS.items() if count == len(ranks)), None)
    if encoding not in ENCODINGS:
        raise UserError(
            f"{name}: {len(ranks)} ranks do not tell their encoding, whose pattern and special tokens are needed: "
            f"write tiktoken:{name}:ENCODING with one of {', '.join(ENCODINGS)}"
        )
    _, pattern, specials = ENCODINGS[encoding]
    return TiktokenTokenizer(complete_file(encoding, pattern, specials, ranks), name)


def _package(name: str) -> Any:
    try:
        import tiktoken
    except ImportError:
        raise UserError(
            f"{name} is a tokenizer of tiktoken's, which needs a package: pip install 'castalia[tiktoken]'"
        ) from None
    return tiktoken
