"""Preparing: the same bytes whatever the workers, nothing half-finished whatever stops it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.data.prepare import Interrupted, Progress, cut_at_lines, encode, prepare, run
from castalia.data.store import TokenStore, is_finished
from castalia.data.tokenizer import (
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from castalia.errors import UserError

WORDS = [
    "the",
    "of",
    "naïve",
    "日本",
    "x1",
    "...",
    "  ",
    "\n",
    "\n\n",
    "return",
    "(a,b)",
    "🙂",
    "\t",
    "'s",
    "\r\n",
]


def some_text(seed: int, num_words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(["", "", " "]) for _ in range(num_words))


@pytest.fixture(scope="module")
def bpe() -> HFTokenizer:
    return HFTokenizer(train_bpe((some_text(s, 300) for s in range(9)), 320).to_str().encode())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "one.txt").write_text(some_text(1, 4000), newline="")
    lines = [json.dumps({"text": some_text(s, s % 50)}) for s in range(400)]
    (folder / "two.jsonl").write_text("\n".join(lines))
    return folder


def texts_of(folder: Path) -> list[str]:
    lines = (folder / "two.jsonl").read_text().splitlines()
    return [t for t in [(folder / "one.txt").read_bytes().decode(), *(json.loads(x)["text"] for x in lines)] if t]


def outputs(prefix: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in prefix.parent.iterdir() if p.name.startswith(prefix.name + ".")}


@pytest.mark.parametrize("kind", ["byte", "hf"])
def test_prepare(tmp_path: Path, corpus: Path, bpe: HFTokenizer, kind: str) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "byte" else bpe
    seen: list[Progress] = []
    summary = prepare([corpus], tmp_path / "out" / "ds", tokenizer, workers=1, progress=seen.append)
    store = TokenStore(tmp_path / "out" / "ds")
    texts = texts_of(corpus)
    assert len(store) == len(texts)
    for i, text in enumerate(texts):
        assert store.get(i).tolist() == [*tokenizer.encode(text), tokenizer.eod]
    assert summary.pop("encoder") == ("numpy" if kind == "byte" else "fastokens")
    assert (summary.pop("proved") > 0) == (kind == "hf")
    assert (
        summary
        == store.info
        == {
            "version": 1,
            "tokenizer": tokenizer.identity(),
            "documents": len(texts),
            "tokens": store.num_tokens,
            "bytes": sum(len(text.encode()) for text in texts),
            "append_eod": True,
            "sources": [{"name": n, "size": (corpus / n).stat().st_size} for n in ("one.txt", "two.jsonl")],
            "castalia": summary["castalia"],
            "sha256": store.fingerprint,
            "bin_sha256": hashlib.sha256(store.bin_path.read_bytes()).hexdigest(),
        }
    )
    assert seen[-1] == Progress(len(texts), store.num_tokens, summary["bytes"])
    copy = tmp_path / "out" / "ds.tokenizer.json"
    if kind == "hf":
        assert load_tokenizer(copy).identity() == tokenizer.identity()
    assert copy.exists() == (kind == "hf")
    assert sum(tokenizer.token_bytes()[store.tokens]) == summary["bytes"]


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_do_not_change_the_bytes(
    tmp_path: Path, corpus: Path, bpe: HFTokenizer, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    prepare([corpus], tmp_path / "one" / "ds", bpe, workers=1)
    monkeypatch.setattr(run, "BLOCK_SIZE", 500)
    monkeypatch.setattr(encode, "PART_SIZE", 100)
    prepare([corpus], tmp_path / "many" / "ds", bpe, workers=workers)
    assert outputs(tmp_path / "one" / "ds") == outputs(tmp_path / "many" / "ds")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


@pytest.mark.parametrize("seed", range(6))
def test_cutting_a_text_keeps_its_ids(bpe: HFTokenizer, seed: int) -> None:
    text = some_text(seed, 3000)
    parts = list(cut_at_lines(text, 50))
    assert len(parts) > 5 and "".join(parts) == text
    assert [i for part in parts for i in bpe.encode(part)] == bpe.encode(text)


def test_documents_of_no_ids(tmp_path: Path) -> None:
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Strip", "strip_left": True, "strip_right": True},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"},
    }
    tokenizer = HFTokenizer(json.dumps(content).encode())
    (tmp_path / "a.jsonl").write_text('"a"\n" "\n""\n"a a"\n')
    with_eod = prepare([tmp_path / "a.jsonl"], tmp_path / "x", tokenizer)
    assert TokenStore(tmp_path / "x").sizes.tolist() == [2, 1, 3]
    without = prepare([tmp_path / "a.jsonl"], tmp_path / "y", tokenizer, append_eod=False)
    assert TokenStore(tmp_path / "y").sizes.tolist() == [1, 2]
    assert (with_eod["bytes"], without["bytes"]) == (5, 4)


def test_existing_output(tmp_path: Path, bpe: HFTokenizer) -> None:
    (tmp_path / "a.txt").write_text("a")
    prepare([tmp_path / "a.txt"], tmp_path / "ds", bpe)
    before = outputs(tmp_path / "ds")
    with pytest.raises(UserError, match="exists already"):
        prepare([tmp_path / "a.txt"], tmp_path / "ds", ByteTokenizer())
    assert outputs(tmp_path / "ds") == before
    prepare([tmp_path / "a.txt"], tmp_path / "ds", ByteTokenizer(), overwrite=True)
    assert sorted(outputs(tmp_path / "ds")) == ["ds.bin", "ds.idx", "ds.json"]
    assert TokenStore(tmp_path / "ds").tokens.tolist() == [97, 256]


def test_failures_leave_nothing(tmp_path: Path, corpus: Path, bpe: HFTokenizer) -> None:
    (corpus / "zzz.jsonl").write_text('{"no text": 1}\n')
    with pytest.raises(UserError, match=r"zzz\.jsonl:1 has no key"):
        prepare([corpus], tmp_path / "ds", bpe)
    (tmp_path / "blank.txt").write_text("")
    with pytest.raises(UserError, match="no text at all"):
        prepare([tmp_path / "blank.txt"], tmp_path / "ds", bpe)
    assert outputs(tmp_path / "ds") == {}
    tokenizer = ByteTokenizer()
    tokenizer.eod = None
    with pytest.raises(UserError, match="no end-of-document token"):
        prepare([corpus], tmp_path / "ds", tokenizer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_the_same_call_goes_on(
    tmp_path: Path, corpus: Path, bpe: HFTokenizer, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BLOCK_SIZE", 2000)
    whole = prepare([corpus], tmp_path / "whole" / "ds", bpe)
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 5:
            signal.raise_signal(number)

    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name) as caught:
        prepare([corpus], tmp_path / "ds", bpe, progress=stop)
    assert caught.value.exit_code == 3 and not is_finished(tmp_path / "ds")
    assert signal.getsignal(number) is handler
    said: list[str] = []
    again = prepare([corpus], tmp_path / "ds", bpe, say=said.append)
    assert said == [f"going on after {seen[4].documents:,} documents that were prepared before"]
    assert again["bin_sha256"] == whole["bin_sha256"]
    assert outputs(tmp_path / "ds") == outputs(tmp_path / "whole" / "ds")


def interrupted(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "BLOCK_SIZE", 2000)
    with pytest.raises(Interrupted):
        prepare([corpus], tmp_path / "ds", tokenizer, progress=lambda p: signal.raise_signal(signal.SIGINT))
    return tmp_path / "ds"


def test_other_settings_do_not_go_on(
    tmp_path: Path, corpus: Path, bpe: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = interrupted(tmp_path, corpus, bpe, monkeypatch)
    left = outputs(prefix)
    with pytest.raises(UserError, match="other settings .append_eod. was interrupted here: .* --restart"):
        prepare([corpus], prefix, bpe, append_eod=False)
    (corpus / "more.txt").write_text("more")
    with pytest.raises(UserError, match="other inputs .or they have changed. was interrupted"):
        prepare([corpus], prefix, bpe)
    assert outputs(prefix) == left
    prepare([corpus], prefix, ByteTokenizer(), restart=True)
    assert sorted(outputs(prefix)) == ["ds.bin", "ds.idx", "ds.json"]
    assert TokenStore(prefix).info["tokenizer"]["type"] == "byte"


def test_torn_journals_and_short_files(
    tmp_path: Path, corpus: Path, bpe: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SYNC_SECONDS", 0)
    expected = prepare([corpus], tmp_path / "whole", bpe)["bin_sha256"]
    prefix = interrupted(tmp_path, corpus, bpe, monkeypatch)
    journal, partial = Path(f"{prefix}.journal.partial"), Path(f"{prefix}.bin.partial")
    journal.write_bytes(journal.read_bytes() + b'{"blocks": 99, "outp')
    partial.write_bytes(partial.read_bytes() + b"torn tail")
    assert prepare([corpus], prefix, bpe)["bin_sha256"] == expected
    assert not list(tmp_path.glob("*.partial"))
    Path(f"{prefix}.idx").unlink()
    prefix = interrupted(tmp_path, corpus, bpe, monkeypatch)
    partial.write_bytes(partial.read_bytes()[:10])  # as after a power cut
    said: list[str] = []
    assert prepare([corpus], prefix, bpe, say=said.append)["bin_sha256"] == expected
    assert said == ["what an interrupted preparation left is incomplete: beginning anew"]


def test_a_full_disk_keeps_what_was_done(
    tmp_path: Path, corpus: Path, bpe: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BLOCK_SIZE", 2000)

    def full(progress: Progress) -> None:
        if progress.documents > 100:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device: .*ds\.bin\.partial .* are kept; make room"):
        prepare([corpus], tmp_path / "ds", bpe, progress=full)
    expected = prepare([corpus], tmp_path / "whole", bpe)["bin_sha256"]
    assert prepare([corpus], tmp_path / "ds", bpe)["bin_sha256"] == expected


def test_killed_with_all_in_place_but_the_journal(
    tmp_path: Path, corpus: Path, bpe: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run.Journal, "remove", lambda self: None)
        first = prepare([corpus], tmp_path / "ds", bpe)
    assert prepare([corpus], tmp_path / "ds", bpe)["bin_sha256"] == first["bin_sha256"]
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(UserError, match="exists already"):
        prepare([corpus], tmp_path / "ds", bpe)


CHILD = """
import os, sys
from castalia.data.prepare import prepare, run
from castalia.data.tokenizer import load_tokenizer

# Die by kill -9 at the n-th event counted from the first call of a named function on; both
# functions run in the main thread, where what happens does not depend on timing.
corpus, prefix, tokenizer, function, moment = sys.argv[1:]
started, left = False, int(moment)

def count(frame, event, arg):
    global started, left
    name = frame.f_code.co_name
    started = started or (name == function and event == "call")
    if started and (function == "finish" or (name == function and event == "call")):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)

run.BLOCK_SIZE, run.SYNC_SECONDS = 2000, 0
loaded = load_tokenizer(tokenizer)
sys.setprofile(count)
prepare([corpus], prefix, loaded, workers=2)
sys.setprofile(None)
print(int(moment) - left)
"""
FOREVER = 10**9


@pytest.mark.parametrize(("function", "num_kills"), [("add_encoded", 2), ("finish", 2)])
def test_kill_at_any_moment_then_run_again(
    tmp_path: Path, corpus: Path, bpe: HFTokenizer, function: str, num_kills: int
) -> None:
    """Nothing that a kill leaves looks finished unless it is, and a rerun is byte-identical."""
    save_tokenizer(bpe.tokenizer, tmp_path / "tokenizer.json")

    def child(prefix: Path, moment: int) -> subprocess.CompletedProcess[str]:
        arguments = [corpus, prefix, tmp_path / "tokenizer.json", function, moment]
        environment = {**os.environ, "PYTHONPATH": str(Path(run.__file__).parents[3])}
        command = [sys.executable, "-c", CHILD, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    whole = child(tmp_path / "whole" / "ds", FOREVER)
    assert whole.returncode == 0, whole.stderr
    expected = outputs(tmp_path / "whole" / "ds")
    prefix = tmp_path / "killed" / "ds"
    draw = random.Random(1)
    # The renames are among the last 150 events.
    last = int(whole.stdout)
    earliest = last - 150 if function == "finish" else 1
    # A run that goes on has less to do, so the kills in its midst come early in each.
    latest = last - 2 if function == "finish" else last // num_kills
    moments = [draw.randrange(earliest, latest) for _ in range(num_kills)]
    for moment in moments:
        killed = child(prefix, moment)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if is_finished(prefix):
            left = {k: v for k, v in outputs(prefix).items() if not k.endswith(".partial")}
            assert left == expected  # killed after the last rename
            (prefix.parent / "ds.idx").unlink()
        else:
            with pytest.raises(UserError):
                TokenStore(prefix)
    again = child(prefix, FOREVER)
    assert again.returncode == 0, again.stderr
    assert outputs(prefix) == expected
