"""Whether a tokenizer.json keeps every byte of a text, and how many bytes each entry stands for.

Decided from the file's parts alone, and in doubt against it: a table of bytes that is wrong for
some text would make bits per byte wrong without a sign of it.
"""

from __future__ import annotations

import re
from typing import Any

# Stages that keep every byte of a text. `Split` and `Punctuation` do unless told to remove.
_KEEPING = frozenset({"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"})


def is_lossless(state: dict[str, Any]) -> bool:
    """Whether the ids of any text hold all of its bytes (NFC apart) and no others.

    Args:
        state: the content of a tokenizer.json.
    """
    normalizers, splitters = flatten(state["normalizer"]), flatten(state["pre_tokenizer"])
    decoders, model = flatten(state["decoder"]), state["model"]
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
    if names_type(state["decoder"], "ByteLevel"):
        spelled = [*normalizers, *splitters]
        return (
            any(stage.get("type") == "ByteLevel" for stage in spelled)
            and all(stage.get("type") in ("NFC", "ByteLevel") for stage in normalizers)
            and vocabulary >= _IN_TEXT
        )
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    return (
        all(stage.get("type") == "NFC" or stage == spaces for stage in normalizers)
        and any(stage.get("type") in ("ByteFallback", "Metaspace") for stage in decoders)
        and bool(model.get("byte_fallback"))
        and vocabulary >= {f"<0x{byte:02X}>" for byte in range(256)}
    )


def flatten(part: Any) -> list[dict[str, Any]]:
    """The stages of a component of a tokenizer.json, sequences taken apart."""
    if not isinstance(part, dict):
        return []
    inner = next((part[key] for key in ("pretokenizers", "normalizers", "decoders") if key in part), None)
    return [part] if inner is None else [stage for one in inner for stage in flatten(one)]


def names_type(part: Any, name: str) -> bool:
    return any(stage.get("type") == name for stage in flatten(part))


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the other bytes as U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


ALPHABET = frozenset(byte_alphabet())
# GPT-NeoX-20B's vocabulary lacks the 13 bytes that UTF-8 never has.
_IN_TEXT = frozenset(c for c, byte in byte_alphabet().items() if byte not in (0xC0, 0xC1) and byte < 0xF5)
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def byte_level_length(token: str) -> int:
    # As its decoder has it: an entry with any letter outside the alphabet stands for itself.
    return len(token) if ALPHABET.issuperset(token) else len(token.encode())


def piece_length(token: str) -> int:
    if _BYTE_PIECE.fullmatch(token):
        return 1
    return len(token.replace("\u2581", " ").encode())
