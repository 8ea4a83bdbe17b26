"""The name of a tokenizer, as users write it, -> the tokenizer.

A file is recognised by what is in it, so that the copy beside a data set or in a run can have one
name, `tokenizer.json`, whatever its kind. Names with a colon say the kind, or are the user's own
`module:attribute`.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from castalia.data.tokenizer.base import Tokenizer
from castalia.data.tokenizer.gpt2 import load_gpt2
from castalia.data.tokenizer.hf import HFTokenizer
from castalia.data.tokenizer.plain import ByteTokenizer, CharTokenizer
from castalia.data.tokenizer.sentencepiece import SentencePieceTokenizer
from castalia.data.tokenizer.tiktoken import TiktokenTokenizer, load_encoding, load_ranks
from castalia.errors import UserError

KINDS = 'a tokenizer.json, a folder with one, a .model, a .tiktoken, "byte", "char", or module:attribute'
_NEEDED = ("kind", "vocab_size", "eod", "identity", "encode", "encode_batch", "decode", "token_bytes", "file_bytes")


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer by its name (see the package's docstring), from its file or the folder of its files.

    Raises:
        UserError: there is no such file, or it is no tokenizer; a package that it needs is missing.
    """
    name = os.fspath(spec)
    path = Path(name).expanduser()
    if path.is_dir() and name not in TOKENIZERS:
        return _load_folder(path)
    if path.is_file():
        return _load_file(path)
    if name in TOKENIZERS:
        return TOKENIZERS[name](None)
    kind, colon, rest = name.partition(":")
    if colon and kind in TOKENIZERS:
        return TOKENIZERS[kind](rest)
    if colon and os.sep not in kind and not name.endswith((".json", ".model", ".tiktoken")):
        return _load_own(name)
    raise UserError(f"{path} does not exist: give {KINDS}")


def load_kept(identity: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of an identity that has no file, since its name says it all; None for one with a file."""
    if identity.get("sha256") is not None:
        return None
    return load_tokenizer(str(identity["type"]))


def _load_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _load_file(folder / "tokenizer.json")
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocabulary).is_file():
            return load_gpt2(folder / vocabulary, folder / merges)
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return _load_file(models[0])
    raise UserError(f"{folder / 'tokenizer.json'} does not exist: give {KINDS}")


def _load_file(path: Path) -> Tokenizer:
    content = path.read_bytes()
    if path.suffix == ".tiktoken":
        return load_ranks(content, str(path))
    if path.suffix == ".model" or (content and not content.lstrip().startswith((b"{", b"["))):
        if path.suffix == ".json" and not _looks_like_protobuf(content):
            return HFTokenizer(content, str(path))  # which says what is wrong with it
        return SentencePieceTokenizer(content, str(path))
    if content[:4096].lstrip().startswith(b'{"tiktoken"'):
        return TiktokenTokenizer(content, str(path))
    merges = path.with_name("merges.txt")
    if path.name == "vocab.json" and merges.is_file() and not _has_model(content):
        return load_gpt2(path, merges)
    return HFTokenizer(content, str(path))


def _looks_like_protobuf(content: bytes) -> bool:
    return content[:1] == b"\n"  # field 1 of a SentencePiece model, its first piece


def _has_model(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content).get("model"), dict)
    except (ValueError, AttributeError):
        return False


def _load_own(name: str) -> Tokenizer:
    """The user's own: an object with the methods of `Tokenizer`, or a class or function that gives one."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"the tokenizer {name!r} cannot be imported ({error}): give {KINDS}") from None
    except AttributeError:
        raise UserError(f"the tokenizer {name!r}: {module} has no {attribute}; name one that it has") from None
    try:
        tokenizer = found() if callable(found) else found
    except TypeError as error:
        raise UserError(f"the tokenizer {name!r} cannot be made without arguments ({error})") from None
    missing = [need for need in _NEEDED if not hasattr(tokenizer, need)]
    if missing:
        raise UserError(f"the tokenizer {name!r} lacks {', '.join(missing)}: see castalia.data.tokenizer.Tokenizer")
    if tokenizer.file_bytes() is None and tokenizer.identity().get("type") != name:
        raise UserError(
            f"the tokenizer {name!r} calls itself {tokenizer.identity().get('type')!r}: without a file, the `type` of "
            f"its identity() is how a data set finds it again, so it should be {name!r}"
        )
    return cast(Tokenizer, tokenizer)


def _nameless(make: Callable[[], Tokenizer], kind: str) -> Callable[[str | None], Tokenizer]:
    def load(rest: str | None) -> Tokenizer:
        if rest is not None:
            raise UserError(f"{kind}:{rest}: the {kind} tokenizer has no file; write {kind} alone")
        return make()

    return load


def _from_file(kind: str) -> Callable[[str | None], Tokenizer]:
    def load(rest: str | None) -> Tokenizer:
        if rest is None:
            raise UserError(f'a tokenizer of type "{kind}" is a file: name it in tokenizer.path')
        return load_tokenizer(rest)

    return load


def _load_gpt2(rest: str | None) -> Tokenizer:
    files = (rest or "").split(":")
    if len(files) != 2:
        raise UserError("GPT-2's tokenizer is two files: write gpt2:VOCAB.json:MERGES.txt, or name their folder")
    return load_gpt2(*(Path(file).expanduser() for file in files))


def _load_tiktoken(rest: str | None) -> Tokenizer:
    if rest is None:
        raise UserError("tiktoken has several encodings: write one, such as tiktoken:cl100k_base, or name a file")
    file, _, encoding = rest.partition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        return load_encoding(rest)
    content = path.read_bytes()
    return load_ranks(content, str(path), encoding or None) if content[:1] != b"{" else _load_file(path)


# What stands before a colon in a tokenizer's name, or is its name; each takes what stands behind, or None.
TOKENIZERS: dict[str, Callable[[str | None], Tokenizer]] = {
    "byte": _nameless(ByteTokenizer, "byte"),
    "char": _nameless(CharTokenizer, "char"),
    "hf": _from_file("hf"),
    "sentencepiece": _from_file("sentencepiece"),
    "gpt2": _load_gpt2,
    "tiktoken": _load_tiktoken,
}
