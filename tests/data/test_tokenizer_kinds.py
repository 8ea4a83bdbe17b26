"""Tokenizers besides tokenizer.json: recognised by name or content, kept whole beside the data, trained."""

from __future__ import annotations

import base64
import io
import json
import pickle
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.cli import main
from castalia.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    Tokenizer,
    encode_flat,
    inspect_tokenizer,
    load_kept,
    load_tokenizer,
    special_tokens,
    train_tokenizer,
)
from castalia.data.tokenizer import train as train_module
from castalia.data.tokenizer.lossless import byte_alphabet
from castalia.data.tokenizer.train import LONGEST_RUN, cut_runs
from castalia.errors import UserError

ALPHABET = {byte: letter for letter, byte in byte_alphabet().items()}
TEXTS = ["the cat sat on the mat and that was that\n", "naïve 日本 🙂 def main(): return 0\n"] * 5


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A pair of files in GPT-2's manner: the bytes, three merges, the end of a document."""
    merges = [("t", "h"), ("th", "e"), ("\u0120", "c")]
    entries = [*(ALPHABET[b] for b in range(256)), *(a + b for a, b in merges), "<|endoftext|>"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return folder


def ranks(path: Path) -> Path:
    entries = [bytes([b]) for b in range(256)] + [b"th", b"the", b" c"]
    path.write_bytes(b"".join(base64.b64encode(e) + b" %d\n" % i for i, e in enumerate(entries)))
    return path


def test_gpt2_files(gpt2: Path) -> None:
    files = f"gpt2:{gpt2 / 'vocab.json'}:{gpt2 / 'merges.txt'}"
    for spec in (str(gpt2), files, str(gpt2 / "vocab.json")):
        tokenizer = load_tokenizer(spec)
        assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eod) == ("hf", 260, 259)
        assert tokenizer.encode("the c<|endoftext|>ä") == [257, 258, 259, 195, 164]
    sizes = tokenizer.token_bytes()
    assert sizes is not None and sizes[256:].tolist() == [2, 3, 2, 0]
    (gpt2 / "merges.txt").write_text("q\n")
    with pytest.raises(UserError, match=r"merges\.txt:1 is no merge"):
        load_tokenizer(gpt2)
    with pytest.raises(UserError, match="two files"):
        load_tokenizer("gpt2:alone.json")


def test_bytes_that_no_text_has_may_be_missing() -> None:
    """GPT-NeoX-20B's vocabulary lacks the 13 bytes that UTF-8 never has, and is lossless."""
    state = json.loads(train_tokenizer(TEXTS, 258).to_str())
    for byte in (0xC0, 0xFF):
        del state["model"]["vocab"][ALPHABET[byte]]
    assert HFTokenizer(json.dumps(state).encode()).token_bytes() is not None
    del state["model"]["vocab"][ALPHABET[0xC3]]
    assert HFTokenizer(json.dumps(state).encode()).token_bytes() is None


@settings(deadline=None, max_examples=40, derandomize=True)
@given(texts=st.lists(st.text()))
def test_char_and_byte_ids(texts: list[str]) -> None:
    tokenizers: list[Tokenizer] = [ByteTokenizer(), CharTokenizer()]
    for tokenizer in tokenizers:
        ids, ends = encode_flat(tokenizer, texts)
        assert ids.tolist() == [i for text in texts for i in text.encode()] and len(ends) == len(texts)
        if texts and not set(texts[0]) & {"\0", "\1"}:
            assert tokenizer.decode(ids[: ends[0]].tolist()) == texts[0]


def test_char_is_gptneox_s() -> None:
    char = load_tokenizer("char")
    assert (char.vocab_size, char.eod, char.token_bytes()) == (512, 0, None)
    assert load_kept(char.identity()).identity() == char.identity()  # type: ignore[union-attr]
    assert load_kept({"type": "hf", "sha256": "ab"}) is None


@pytest.mark.skipif(find_spec("tiktoken") is None, reason="tiktoken is not installed")
def test_rank_files(tmp_path: Path) -> None:
    file = ranks(tmp_path / "a.tiktoken")
    with pytest.raises(UserError, match="259 ranks do not tell their encoding.*tiktoken:.*:ENCODING"):
        load_tokenizer(file)
    (tmp_path / "bad.tiktoken").write_text("AA== x\n")
    with pytest.raises(UserError, match=r"bad\.tiktoken:1 is no rank"):
        load_tokenizer(tmp_path / "bad.tiktoken")
    tokenizer = load_tokenizer(f"tiktoken:{file}:r50k_base")
    assert tokenizer.encode("the c") == [257, 258] and tokenizer.eod == 50256
    assert tokenizer.eod not in tokenizer.encode("<|endoftext|>")
    ids, ends = encode_flat(tokenizer, ["the", "", "ä c"])
    assert ids.tolist() == [257, 195, 164, 258] and ends.tolist() == [1, 1, 4]
    sizes = tokenizer.token_bytes()
    assert sizes is not None and sizes[[0, 257, 50256]].tolist() == [1, 3, 0]
    content = tokenizer.file_bytes()
    assert content is not None
    (tmp_path / "ds.tokenizer.json").write_bytes(content)  # as beside a data set
    for copy in (load_tokenizer(tmp_path / "ds.tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.identity() == tokenizer.identity() and copy.encode("the c") == [257, 258]


@pytest.mark.skipif(find_spec("tiktoken") is None, reason="tiktoken is not installed")
def test_patterns_are_tiktoken_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken_ext.openai_public as theirs

    from castalia.data.tokenizer.tiktoken import ENCODINGS

    monkeypatch.setattr(theirs, "load_tiktoken_bpe", lambda *a, **k: {})
    monkeypatch.setattr(theirs, "data_gym_to_mergeable_bpe_ranks", lambda *a, **k: {})
    for name, (_, pattern, specials) in ENCODINGS.items():
        found = getattr(theirs, name)()
        assert (found["pat_str"], found["special_tokens"].items() >= specials.items()) == (pattern, True), name


@pytest.mark.skipif(find_spec("sentencepiece") is None, reason="sentencepiece is not installed")
def test_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    made = {}
    for name, more in (("plain", {}), ("neox", {"user_defined_symbols": ["<|endoftext|>"]})):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, hard_vocab_limit=False,
            model_type="bpe", minloglevel=2, **more,
        )  # fmt: skip
        made[name] = model.getvalue()
    (tmp_path / "a.model").write_bytes(made["plain"])
    (tmp_path / "ds.tokenizer.json").write_bytes(made["plain"])
    tokenizer = load_tokenizer(tmp_path / "a.model")
    assert tokenizer.eod == 2 and tokenizer.token_bytes() is None  # </s>, where GPT-NeoX took the unknown token
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"
    assert special_tokens(tokenizer) == {"<s>": 1, "</s>": 2}
    assert load_tokenizer(tmp_path / "ds.tokenizer.json").identity() == tokenizer.identity()
    (tmp_path / "b.model").write_bytes(made["neox"])
    assert load_tokenizer(f"sentencepiece:{tmp_path / 'b.model'}").eod == 3
    (tmp_path / "c.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="neither a tokenizer.json nor a SentencePiece model"):
        load_tokenizer(tmp_path / "c.model")


def test_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tokenizer.py").write_text(
        "from castalia.data.tokenizer import ByteTokenizer\n"
        "class Mine(ByteTokenizer):\n"
        "    def identity(self):\n"
        "        return {**super().identity(), 'type': 'my_tokenizer:Mine'}\n"
        "other = ByteTokenizer()\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tokenizer", raising=False)
    mine = load_tokenizer("my_tokenizer:Mine")
    assert mine.encode("a") == [97] and load_kept(mine.identity()) is not None
    for spec, said in (
        ("my_tokenizer:other", "calls itself 'byte'"),
        ("my_tokenizer:number", "lacks kind, vocab_size"),
        ("my_tokenizer:nothing", "has no nothing"),
        ("no_such_module:x", "cannot be imported"),
        ("json:loads", "cannot be made without arguments"),
        ("byte:3", "write byte alone"),
        ("hf", "is a file"),
        ("nothing.json", "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            load_tokenizer(spec)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_training_kinds(kind: str) -> None:
    tokenizer = HFTokenizer(train_tokenizer(TEXTS, 320, kind, ["<s>", "</s>"]).to_str().encode())
    assert special_tokens(tokenizer).items() >= {"<s>": 0, "</s>": 1}.items() and tokenizer.eod == 1
    text = "the cat 🙂 der Hund"
    lossless = kind != "wordpiece"
    assert (tokenizer.decode(tokenizer.encode(text)) == text) == lossless
    assert (tokenizer.token_bytes() is not None) == lossless
    assert (tokenizer.unknown is None) == lossless


def test_gptneox_s_options() -> None:
    state = json.loads(train_tokenizer(TEXTS, 300, normalizer="nfkc", prefix_space=True).to_str())
    assert state["normalizer"] == {"type": "NFKC"} and state["pre_tokenizer"]["add_prefix_space"]
    with pytest.raises(UserError, match="not as 'lower'"):
        train_tokenizer(TEXTS, 300, normalizer="lower")
    with pytest.raises(UserError, match="larger than any"):
        train_tokenizer(TEXTS, 10**12)
    with pytest.raises(UserError, match="should differ"):
        train_tokenizer(TEXTS, 300, specials=["a", "a"])


def test_long_runs_are_cut_for_training() -> None:
    texts = ["a" * (3 * LONGEST_RUN + 5), "short words " * 500, "", " " * (2 * LONGEST_RUN)]
    pieces = list(cut_runs(texts))
    assert "".join(pieces) == "".join(texts) and texts[1] in pieces
    assert max(len(piece) for piece in pieces if piece != texts[1]) == LONGEST_RUN


def test_training_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, release = threading.Event(), threading.Event()

    def texts() -> Iterator[str]:
        reading.set()
        release.wait(10)
        yield "text"

    def interrupt(now: train_module.Training) -> None:
        if reading.is_set():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(texts(), 300, progress=interrupt)
    release.set()

    def broken() -> Iterator[str]:
        raise UserError("a text is damaged")
        yield ""

    with pytest.raises(Exception, match="a text is damaged"):
        train_tokenizer(broken(), 300)


def test_inspect_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_tokenizer(ByteTokenizer(), ["ab", "ä" * 10], limit=10)
    assert found["documents"] == 2 and found["bytes_per_token"] == 1 and found["round_trip"] == 1
    word = HFTokenizer(train_tokenizer(TEXTS, 300, "wordpiece").to_str().encode())
    found = inspect_tokenizer(word, ["the cat", "Ж Ж"])
    assert found["unknown_rate"] == pytest.approx(2 / found["tokens"]) and found["first_changed"] == 1
    assert not found["exact_bytes"]
    (tmp_path / "a.txt").write_text("the cat")
    assert main(["tokenizer", "inspect", "char", str(tmp_path / "a.txt"), "--text", "hi"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["tokens"], shown["text"]["tokens"]) == (7, [[104, "h"], [105, "i"]])


def test_the_verb_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.txt"
    source.write_text(TEXTS[0])
    command = ["tokenizer", "train", str(source), "--output"]
    assert main([*command, str(source), "--overwrite"]) == 2
    assert "is one of the texts" in capsys.readouterr().err and source.read_text() == TEXTS[0]
    assert main([*command, str(tmp_path / "new" / "t.json"), "--vocab-size", "5000"]) == 0
    assert "fewer than the 5,000 asked for" in capsys.readouterr().err
    assert main([*command, ""]) == 2
    assert np.all(load_tokenizer(tmp_path / "new" / "t.json").token_bytes() is not None)
