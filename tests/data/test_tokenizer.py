"""Tokenizers: lossless, exact in bytes, recognised by their file."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data.tokenizer import (
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from castalia.errors import UserError

TEXTS = ["def main():\n    return 'ä€'\n", "the cat sat on the mat; the cat sat\t\n\n", "naïve 日本 🙂"] * 3


@pytest.fixture(scope="module")
def bpe() -> HFTokenizer:
    return HFTokenizer(train_bpe(TEXTS, 300).to_str().encode())


@settings(deadline=None, max_examples=80, derandomize=True)
@given(text=st.text())
def test_round_trip_and_bytes(bpe: HFTokenizer, text: str) -> None:
    tokenizers: list[Tokenizer] = [bpe, ByteTokenizer()]
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids) and tokenizer.eod not in ids
        assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())
        assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


def test_train_bpe(bpe: HFTokenizer) -> None:
    assert (bpe.vocab_size, bpe.eod, bpe.kind) == (300, 0, "hf")
    assert bpe.tokenizer.token_to_id("<|padding|>") == 1
    sizes = bpe.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (300,)
    assert sizes[:2].tolist() == [0, 0] and (sizes[2:258] == 1).all() and (sizes[258:] > 1).all()
    assert len(bpe.encode(" cat sat")) < len(" cat sat")
    assert train_bpe(TEXTS, 300).to_str() == bpe.tokenizer.to_str()
    with pytest.raises(UserError, match="too small"):
        train_bpe(TEXTS, 257)


def test_byte_tokenizer() -> None:
    tokenizer = load_tokenizer("byte")
    assert tokenizer.encode("aä") == [97, 195, 164]
    assert tokenizer.decode([97, 256, 195]) == "a\ufffd"
    assert tokenizer.identity() == {"type": "byte", "sha256": None, "vocab_size": 257, "eod": 256}
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]
    assert tokenizer.file_bytes() is None


def test_load_and_identity(tmp_path: Path) -> None:
    save_tokenizer(train_bpe(TEXTS, 280), tmp_path / "new" / "tokenizer.json")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tokenizer.json"]
    content = (tmp_path / "new" / "tokenizer.json").read_bytes()
    for spec in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        tokenizer = load_tokenizer(spec)
        assert tokenizer.identity() == {
            "type": "hf",
            "sha256": hashlib.sha256(content).hexdigest(),
            "vocab_size": 280,
            "eod": 0,
        }
        assert tokenizer.file_bytes() == content
        assert pickle.loads(pickle.dumps(tokenizer)).identity() == tokenizer.identity()


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b"[]"])
def test_no_tokenizer(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json (does not exist|is not a)"):
        load_tokenizer(tmp_path)


def changed(bpe: HFTokenizer, **changes: object) -> HFTokenizer:
    return HFTokenizer(json.dumps(json.loads(bpe.file_bytes() or b"") | changes).encode())


def added(content: str, i: int, special: bool) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": special, **flags}


def test_added_tokens_count_their_bytes_unless_special(bpe: HFTokenizer) -> None:
    tokenizer = changed(bpe, added_tokens=[added("  ", 300, False), added("ä€", 301, False), added("</s>", 302, True)])
    assert (tokenizer.vocab_size, tokenizer.eod) == (303, 0)
    assert tokenizer.token_bytes()[300:].tolist() == [2, 5, 0]
    assert tokenizer.encode("a  ä€</s>")[-3:] == [300, 301, 302]
    assert tokenizer.decode([300, 301]) == "  ä€"


def test_truncation_and_padding_of_the_file_are_ignored(bpe: HFTokenizer) -> None:
    tokenizer = changed(
        bpe,
        truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<|padding|>",
        },
    )
    assert tokenizer.encode_batch(["a", "0123456789"]) == bpe.encode_batch(["a", "0123456789"])


def test_word_level_without_eod() -> None:
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "ä": 1, "▁b": 2, "<0x0A>": 5}, "unk_token": "a"},
    }
    tokenizer = HFTokenizer(json.dumps(content).encode())
    assert tokenizer.eod is None
    assert tokenizer.vocab_size == 6 and tokenizer.token_bytes() is None  # ids 3 and 4 are a gap
    assert not tokenizer.splits_at_lines()


def test_cutting_is_allowed_only_where_it_is_safe(bpe: HFTokenizer) -> None:
    assert bpe.splits_at_lines()
    assert changed(bpe, normalizer={"type": "NFC"}).splits_at_lines()
    assert not changed(bpe, normalizer={"type": "NFKC"}).splits_at_lines()
    assert not changed(bpe, added_tokens=[added("a\nb", 300, False)]).splits_at_lines()
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    assert not changed(bpe, pre_tokenizer=level).splits_at_lines()


def fallback(**changes: object) -> HFTokenizer:
    """A vocabulary in SentencePiece's manner: "▁" for a space, <0x..> for what has no entry."""
    entries = ["a", "ä", "\u2581", "\u2581a", *(f"<0x{byte:02X}>" for byte in range(256)), "</s>"]
    content: dict[str, object] = {
        "version": "1.0",
        "added_tokens": [added("</s>", 260, True)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "vocab": {entry: i for i, entry in enumerate(entries)},
            "merges": [["\u2581", "a"]],
            "byte_fallback": True,
        },
    }
    return HFTokenizer(json.dumps({**content, **changes}).encode())


@settings(deadline=None, max_examples=80, derandomize=True)
@given(text=st.text().filter(lambda text: "\u2581" not in text))
def test_bytes_with_fallback(text: str) -> None:
    tokenizer = fallback()
    sizes = tokenizer.token_bytes()
    assert sizes is not None and sizes[260] == 0
    assert int(sizes[tokenizer.encode(text)].sum()) == len(text.encode())


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPACE = {"type": "Split", "pattern": {"String": " "}, "invert": False}


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, True),
        ({"normalizer": {"type": "NFC"}}, True),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, False),
        ({"normalizer": {"type": "NFKC"}}, False),
        ({"normalizer": {"type": "StripAccents"}}, False),
        ({"pre_tokenizer": {**LEVEL, "add_prefix_space": True}}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, LEVEL]}}, False),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**SPACE, "behavior": "Isolated"}, LEVEL]}},
            True,
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**SPACE, "behavior": "Removed"}, LEVEL]}},
            False,
        ),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, False),
        ({"decoder": None}, False),
    ],
)
def test_no_table_where_bytes_are_lost_or_added(bpe: HFTokenizer, changes: dict[str, object], exact: bool) -> None:
    assert (changed(bpe, **changes).token_bytes() is not None) == exact


def test_no_table_without_all_bytes() -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "merges": [], "unk_token": "[UNK]"}
    assert fallback(model=model, added_tokens=[]).token_bytes() is None
    byte_level = {"normalizer": None, "pre_tokenizer": LEVEL, "decoder": LEVEL, "added_tokens": []}
    assert fallback(model=model, **byte_level).token_bytes() is None
    prefixed = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    assert fallback(normalizer=None, pre_tokenizer=prefixed).token_bytes() is None
