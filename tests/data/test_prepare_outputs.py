"""What one pass writes: several keys, masked labels, conversations, shards, and the same from every engine."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from castalia.cli import main
from castalia.data.merge import merge_stores
from castalia.data.prepare import ChatRecipe, prepare, run, run_recipe, shard_inputs
from castalia.data.prepare.recipes import masked
from castalia.data.prepare.shard import parse_shard
from castalia.data.sources import SourceOptions
from castalia.data.store import TokenStore
from castalia.data.tokenizer import ByteTokenizer
from castalia.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def text_of(store: TokenStore, i: int = 0) -> str:
    return "".join(chr(t) if 0 <= t < 256 else {256: "$", -100: "_"}[int(t)] for t in store.get(i))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(7):
        lines(folder / f"{k}.jsonl", [{"text": f"file {k} line {n} é" * (k + 1)} for n in range(30)])
    return folder


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx", "json")]


def test_several_keys_in_one_pass(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"q": "one", "a": "1"}, {"q": "two", "a": "22"}])
    prepare([source], tmp_path / "ds", ByteTokenizer(), ["q", "a"])
    assert [text_of(TokenStore(tmp_path / "ds_q"), i) for i in (0, 1)] == ["one$", "two$"]
    assert [text_of(TokenStore(tmp_path / "ds_a"), i) for i in (0, 1)] == ["1$", "22$"]


def test_labels_are_masked_up_to_the_first_pattern(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"text": "q> a> b"}, {"text": "no mark"}, {"text": "x>"}, {"text": "> y"}])
    command = ["prepare", str(source), "--tokenizer", "byte", "--output", str(tmp_path / "ds")]
    assert main([*command, "--mask-before-token", "62,32"]) == 0
    ids, labels = TokenStore(tmp_path / "ds"), TokenStore(tmp_path / "ds_label")
    assert ids.dtype == labels.dtype == np.dtype("<i4") and np.array_equal(ids.sizes, labels.sizes)
    assert [text_of(labels, i) for i in range(4)] == ["___a> b$", "no mark$", "x>$", "__y$"]
    assert labels.info is not None and labels.info["holds"] == "label"


def test_a_pattern_does_not_reach_into_the_next_document() -> None:
    ids = np.array([1, 2, 3, 1, 2], np.int32)
    assert masked(ids, np.array([1, 4]), [1, 2]).tolist() == [1, -100, -100, -100, -100]
    assert masked(ids, np.array([4, 1]), [1, 2]).tolist() == [-100, -100, 3, 1, 2]
    assert masked(ids[:1], np.array([1]), [1, 2]).tolist() == [1]


CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "bot", "content": "ho"},
    {"role": "user", "content": "?"},
    {"role": "bot", "content": "!"},
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "_" * len("<user>hi\n<bot>") + "ho\n" + "_" * len("<user>?\n<bot>") + "!\n$"),
        ({"only_last": True}, "_" * len("<user>hi\n<bot>ho\n<user>?\n<bot>") + "!\n$"),
        ({"no_mask": True}, "<user>hi\n<bot>ho\n<user>?\n<bot>!\n$"),
        ({"generation_role": "nobody"}, "_" * len("<user>hi\n<bot>ho\n<user>?\n<bot>!\n$")),
        ({"for_reward_model": True}, "_" * len("<user>hi\n<bot>ho\n<user>?\n<bot>!\n$") + "$"),
    ],
)
def test_conversations(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    source = lines(tmp_path / "a.jsonl", [{"conversation": CONVERSATION, "reward": 0.5}, {"conversation": []}])
    settings = {"generation_role": "bot", **settings}
    recipe = ChatRecipe(ByteTokenizer(), SourceOptions(), TEMPLATE, reward_key="reward", **settings)
    run_recipe([source], tmp_path / "ds", recipe)
    ids, labels = TokenStore(tmp_path / "ds"), TokenStore(tmp_path / "ds_label")
    ends = "$$" if settings.get("for_reward_model") else "$"
    assert text_of(ids) == "<user>hi\n<bot>ho\n<user>?\n<bot>!\n" + ends
    assert text_of(labels) == expected
    assert TokenStore(tmp_path / "ds_reward").tokens.tolist() == [0.5]


def test_bad_conversations_name_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    command = ["prepare", "--chat", "--tokenizer", "byte", "--output", str(tmp_path / "ds")]
    for value, template, said in (
        ({"conversation": "text"}, "t.jinja", "a.jsonl:1: a conversation is a list of objects"),
        ({"text": "x"}, "t.jinja", "a.jsonl:1 has no key 'conversation'"),
        ({"conversation": CONVERSATION}, "t.jinja", "does not fit this conversation (roles must alternate)"),
        ({"conversation": CONVERSATION}, "none.jinja", "none.jinja does not exist"),
    ):
        source = lines(tmp_path / "a.jsonl", [value])
        assert main([*command, str(source), "--chat-template", str(tmp_path / template)]) == 2
        assert said in capsys.readouterr().err
    assert main(["prepare", str(source), "--tokenizer", "byte", "--output", str(tmp_path / "ds"), "--only-last"]) == 2
    assert "--only-last is for conversations: add --chat" in capsys.readouterr().err


@pytest.mark.parametrize("n", [1, 3, 7])
def test_merged_shards_are_what_one_run_writes(tmp_path: Path, files: Path, n: int) -> None:
    prepare([files], tmp_path / "whole", ByteTokenizer())
    for i in range(n):
        prepare([files], tmp_path / "part", ByteTokenizer(), shard=(i, n))
    parts = sorted(str(p).removesuffix(".idx") for p in tmp_path.glob("part-*-of-*.idx"))
    assert len(parts) == n
    merge_stores(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


def test_shards_cover_the_files_once() -> None:
    described = [{"name": str(k), "bytes": size} for k, size in enumerate([1, 900, 1, 1, None, 1, 50])]
    for n in range(1, 8):
        parts = [shard_inputs(described, i, n) for i in range(n)]
        assert all(parts) and [one for part in parts for one in part] == described
    with pytest.raises(UserError, match="only 7 files"):
        shard_inputs(described, 0, 8)
    assert parse_shard("3/16") == (3, 16)
    for wrong in ("4/4", "1", "-1/3", "a/b", "0/0"):
        with pytest.raises(UserError, match="give i/n"):
            parse_shard(wrong)


def test_processes_write_the_same_and_name_faults(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BLOCK_SIZE", 300)
    prepare([files], tmp_path / "threads", ByteTokenizer(), workers=2)
    prepare([files], tmp_path / "processes", ByteTokenizer(), workers=2, engine="processes")
    assert content(tmp_path / "threads") == content(tmp_path / "processes")
    lines(files / "9.jsonl", [{"other": 1}])
    with pytest.raises(UserError, match=r"9\.jsonl:1 has no key 'text'"):
        prepare([files], tmp_path / "bad", ByteTokenizer(), workers=1, engine="processes")


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (pip install 'castalia[ray]')")
def test_ray_writes_the_same(tmp_path: Path, files: Path) -> None:
    prepare([files], tmp_path / "threads", ByteTokenizer())
    prepare([files], tmp_path / "ray", ByteTokenizer(), workers=1, engine="ray")
    assert content(tmp_path / "threads") == content(tmp_path / "ray")


def test_bad_settings(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", str(files), "--tokenizer", "byte", "--output"]
    for more, said in (
        ([""], "the output '' names no files"),
        ([str(tmp_path / "ds"), "--workers", "-1"], "--workers -1: give a number from 1"),
        ([str(tmp_path / "ds"), "--mask-before-token", "a"], "--mask-before-token a: give ids"),
        ([str(tmp_path / "ds"), "--shard", "2/2"], "--shard 2/2: give i/n"),
        ([str(tmp_path / "ds"), "--text-key", "a", "a"], "the keys should differ"),
    ):
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err
    (files / "huge.jsonl").write_text('{"text": ' + "9" * 5000 + "}\n")
    assert main([*command, str(tmp_path / "ds")]) == 2
    assert "huge.jsonl:1" in capsys.readouterr().err
    assert not list(tmp_path.glob("ds*"))
