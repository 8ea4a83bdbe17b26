"""Text <-> token ids, and what each id weighs in bytes.

    "byte"                     -> ByteTokenizer: ids 0..255 are bytes, 256 ends a document
    tokenizer.json or a folder -> HFTokenizer: a file of Hugging Face's `tokenizers`

A tokenizer never adds special tokens of its own; where documents end is the preparer's
business. `token_bytes` makes bits per byte exact: a loss in nats, summed over tokens, can be
divided by the bytes that those very tokens stand for. Where a tokenizer loses or adds text,
so that no such table is right, there is none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from castalia.errors import UserError

if TYPE_CHECKING:
    import tokenizers

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

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def file_bytes(self) -> bytes | None:
        return None


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

    def __reduce__(self) -> tuple[type[HFTokenizer], tuple[bytes]]:
        return HFTokenizer, (self._content,)

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
        if not _is_lossless(json.loads(self.tokenizer.to_str())):
            return None
        added = self.tokenizer.get_added_tokens_decoder()
        length = _byte_level_length if self.is_byte_level() else _piece_length
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items():
            if i not in added:
                sizes[i] = length(token)
            elif not added[i].special:
                sizes[i] = len(added[i].content.encode())
        return sizes

    def file_bytes(self) -> bytes | None:
        return self._content

    def is_byte_level(self) -> bool:
        """Whether vocabulary entries are spelled in GPT-2's alphabet of bytes."""
        return _names_type(json.loads(self.tokenizer.to_str())["decoder"], "ByteLevel")

    def splits_at_lines(self) -> bool:
        """Whether a text may be cut before a newline between two letters without changing its ids.

        So it is with the pre-tokenisation of GPT-2 and those derived from it, which never
        join a newline to a letter before or after it. NFC does not reach across a newline
        either. Used to tokenise a long text in parts.
        """
        state = json.loads(self.tokenizer.to_str())
        stages = _flatten(state["pre_tokenizer"])
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


# Stages that keep every byte of a text. `Split` and `Punctuation` do unless told to remove.
_KEEPING = frozenset({"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"})


def _is_lossless(state: dict[str, Any]) -> bool:
    """Whether the ids of any text hold all of its bytes (NFC apart) and no others.

    Args:
        state: the content of a tokenizer.json.
    """
    normalizers, splitters = _flatten(state["normalizer"]), _flatten(state["pre_tokenizer"])
    decoders, model = _flatten(state["decoder"]), state["model"]
    if not all(stage.get("type") in _KEEPING and stage.get("behavior") != "Removed" for stage in splitters):
        return False
    if any(stage.get("add_prefix_space") or stage.get("prepend_scheme", "never") != "never" for stage in splitters):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if any(not token["special"] and (token["lstrip"] or token["rstrip"]) for token in state["added_tokens"]):
        return False
    entries = model["vocab"]  # a mapping, or pairs of entry and score
    vocabulary = set(entries if isinstance(entries, dict) else (entry for entry, _ in entries))
    if _names_type(state["decoder"], "ByteLevel"):
        spelled = [*normalizers, *splitters]
        return (
            any(stage.get("type") == "ByteLevel" for stage in spelled)
            and all(stage.get("type") in ("NFC", "ByteLevel") for stage in normalizers)
            and vocabulary >= _ALPHABET
        )
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    return (
        all(stage.get("type") == "NFC" or stage == spaces for stage in normalizers)
        and any(stage.get("type") in ("ByteFallback", "Metaspace") for stage in decoders)
        and bool(model.get("byte_fallback"))
        and vocabulary >= {f"<0x{byte:02X}>" for byte in range(256)}
    )


def _flatten(part: Any) -> list[dict[str, Any]]:
    """The stages of a component of a tokenizer.json, sequences taken apart."""
    if not isinstance(part, dict):
        return []
    inner = next((part[key] for key in ("pretokenizers", "normalizers", "decoders") if key in part), None)
    return [part] if inner is None else [stage for one in inner for stage in _flatten(one)]


def _names_type(part: Any, name: str) -> bool:
    return any(stage.get("type") == name for stage in _flatten(part))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the other bytes as U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_ALPHABET = frozenset(_byte_alphabet())
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_level_length(token: str) -> int:
    # As its decoder has it: an entry with any letter outside the alphabet stands for itself.
    return len(token) if _ALPHABET.issuperset(token) else len(token.encode())


def _piece_length(token: str) -> int:
    if _BYTE_PIECE.fullmatch(token):
        return 1
    return len(token.replace("\u2581", " ").encode())


def _load_byte(path: str | None = None) -> Tokenizer:
    return ByteTokenizer()


def _load_hf(path: str | None = None) -> Tokenizer:
    if path is None:
        raise UserError('a tokenizer of type "hf" is a file: name a tokenizer.json or its folder in tokenizer.path')
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise UserError(f'{file} does not exist: give a tokenizer.json, a folder with one, or "byte"')
    return HFTokenizer(file.read_bytes(), str(file))


# Loaders of tokenizers by the `type` of their identity; each takes `tokenizer.path`, which may be None.
TOKENIZERS: dict[str, Callable[[str | None], Tokenizer]] = {"byte": _load_byte, "hf": _load_hf}


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer by its registered name ("byte"), or from a tokenizer.json or its folder.

    Raises:
        UserError: there is no such file, or it is no tokenizer.
    """
    name = os.fspath(spec)
    if name in TOKENIZERS and not Path(name).exists():
        return TOKENIZERS[name](None)
    return _load_hf(name)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    specials: Sequence[str] = ("<|endoftext|>", "<|padding|>"),
) -> tokenizers.Tokenizer:
    """Train a lossless byte-level BPE: GPT-2's regular expression, all 256 bytes, no normaliser.

    Ids: the specials in order, then the bytes, then the merges.

    Raises:
        UserError: `vocab_size` does not hold the specials and the 256 bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    least = 256 + len(specials)
    if vocab_size < least:
        raise UserError(f"a vocabulary of {vocab_size} is too small: 256 bytes and the specials take {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in specials],
        initial_alphabet=sorted(_ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write a tokenizer.json whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{target}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(tokenizer.to_str(pretty=True))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)
