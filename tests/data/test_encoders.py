"""The quick encoder: the ids of Hugging Face's tokenizers for any text, or not used at all."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data.prepare import prepare
from castalia.data.prepare.encode import Encoder, FastEncoder
from castalia.data.tokenizer import HFTokenizer, train_bpe

pytestmark = pytest.mark.skipif(find_spec("fastokens") is None, reason="fastokens has no wheel for this platform")

TEXTS = ["def main():\n        return 'ä€'\n", "the cat sat on the mat; the cat sat\t\n\n", "naïve 日本 🙂"] * 3
# What tokenizers differ in: added tokens, composition, blanks of every kind, scripts, ends of words.
FRAGMENTS = [
    *("<|endoftext|>", "<|padding|>", "<|end", "  ", "    ", "e\u0301", "\u0301", "é", "\u1100\u1161\u11a8", "ﬁ"),
    *("\u2126", "\u200b", "\u00a0", "\u3000", "\u2028", "\x85", "\x00", "\r\n", "\n\n", "'s", "'LL", "’s", "٣", "Ⅷ"),
    *("ſ", "\ufeff", "\U0010ffff", "👨‍👩‍👧", "a" * 300, "=" * 90, "the", " cat", "0123456789"),
]
ODD = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=30).map("".join)


def with_changes(**changes: Any) -> HFTokenizer:
    state = json.loads(train_bpe(TEXTS, 340).to_str())
    return HFTokenizer(json.dumps(state | changes).encode())


def added(content: str, i: int, special: bool, normalized: bool = False) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized}
    return {"id": i, "content": content, "special": special, **flags}


def neox_like() -> HFTokenizer:
    """As GPT-NeoX-20B's: NFC, and runs of blanks as added tokens."""
    size = with_changes().vocab_size
    runs = [added(" " * n, size + n - 2, False, True) for n in range(2, 12)]
    specials = [added("<|endoftext|>", 0, True), added("<|padding|>", 1, True)]
    return with_changes(normalizer={"type": "NFC"}, added_tokens=[*specials, *runs])


@pytest.fixture(scope="module", params=["plain", "nfc", "neox"])
def tokenizer(request: pytest.FixtureRequest) -> HFTokenizer:
    return {"plain": with_changes, "nfc": lambda: with_changes(normalizer={"type": "NFC"}), "neox": neox_like}[
        request.param
    ]()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(texts=st.lists(ODD, min_size=1, max_size=5))
def test_equal_for_any_text(tokenizer: HFTokenizer, texts: list[str]) -> None:
    encoder = Encoder(tokenizer)
    assert encoder.fast is not None
    ids, ends = encoder.encode([*texts, "plain text", ""])
    found = [part.tolist() for part in np.split(ids, ends[:-1])]
    assert found == tokenizer.encode_batch([*texts, "plain text", ""])


def test_not_used_where_added_tokens_are_not_what_the_file_says() -> None:
    gap = [added("<|endoftext|>", 0, True), added("  ", with_changes().vocab_size + 5, False, True)]
    assert Encoder(with_changes(added_tokens=gap)).fast is None  # tokenizers gives it another id


def test_a_quick_encoder_that_errs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FastEncoder.encode_flat

    def wrong(self: FastEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, ends = right(self, texts)
        return np.where(ids == ids.max(), ids - 1, ids), ends

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    tokenizer = with_changes()
    expected = prepare([tmp_path / "a.jsonl"], tmp_path / "plain", tokenizer, encoder="plain")
    said: list[str] = []
    monkeypatch.setattr(FastEncoder, "encode_flat", wrong)
    found = prepare([tmp_path / "a.jsonl"], tmp_path / "auto", tokenizer, say=said.append)
    assert found["bin_sha256"] == expected["bin_sha256"]
    assert (found["encoder"], expected["encoder"]) == ("tokenizers", "tokenizers")
    assert said == ["fastokens gives other ids than tokenizers for this corpus: tokenizers does the work, slower"]


def test_later_blocks_are_proved_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from castalia.data.prepare import recipes, run
    from castalia.errors import UserError

    monkeypatch.setattr(recipes, "PROOF_INTERVAL", 4)
    monkeypatch.setattr(run, "BLOCK_SIZE", 100)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t * 3}) + "\n" for t in TEXTS * 4))
    tokenizer = with_changes()
    assert prepare([tmp_path / "a.jsonl"], tmp_path / "ok", tokenizer, workers=1)["proved"] > 3
    calls = []

    def prove(self: Encoder, texts: list[str]) -> tuple[int, int | None]:
        calls.append(texts)
        return len(texts), None if len(calls) == 1 else 0

    monkeypatch.setattr(Encoder, "prove", prove)
    with pytest.raises(UserError, match=r"a\.jsonl, document 3: fastokens gives other ids .* --encoder plain"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "bad", tokenizer, workers=1)
    assert not list(tmp_path.glob("bad*"))
