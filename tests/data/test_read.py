"""Reading text: every packing, and every fault named with its place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from castalia.data.read import Document, iter_documents
from castalia.errors import UserError


def zstd(content: bytes) -> bytes:
    packed: bytes = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    return packed


PACKINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}
LINES = ["first", "", "zweite Zeile: ä\n€", "x" * 300_000]
JSONL = "".join(json.dumps({"text": t}, ensure_ascii=n % 2 == 0) + "\n" for n, t in enumerate(LINES)).encode()


@pytest.mark.parametrize("packing", PACKINGS)
def test_jsonl(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACKINGS[packing](JSONL))
    assert list(iter_documents([path])) == [
        Document("first", str(path), 0, 5),
        Document(LINES[2], str(path), 2, 20),  # the empty one is left out
        Document(LINES[3], str(path), 3, 300_000),
    ]


@pytest.mark.parametrize("packing", PACKINGS)
def test_txt_is_one_document(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt{packing}"
    text = "one\r\n\ntwo ä\n"
    path.write_bytes(PACKINGS[packing](text.encode()))
    assert list(iter_documents(path)) == [Document(text, str(path), 0, 13)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_last_ending_decides(tmp_path: Path, packing: str) -> None:
    for name, count in (("notes.jsonl.txt", 1), ("notes.txt.jsonl", 2)):
        path = tmp_path / f"{name}{packing}"
        path.write_bytes(PACKINGS[packing](b'"a"\n"b"\n'))
        assert len(list(iter_documents([path]))) == count


def test_other_shapes_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"body": ["a", "b"]}\r\n\n"bare"\n  \n{"body": "no newline at the end"}')
    assert [d.text for d in iter_documents([path], text_key="body")] == [
        "a\n\nb",
        "bare",
        "no newline at the end",
    ]


def test_folders_are_sorted_and_searched(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/k.jsonl", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(name))
    (tmp_path / "z.txt").write_text("given first")
    texts = [d.text for d in iter_documents([tmp_path / "z.txt", tmp_path / "a", tmp_path / "b.txt"])]
    assert texts == ["given first", "a/k.jsonl", '"a/z.txt"', '"b.txt"']


def test_two_zstandard_frames(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"one ") + zstd(b"two"))
    assert [d.text for d in iter_documents([tmp_path / "a.txt.zst"])] == ["one two"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pdf", b"x", "a.pdf has an unknown ending"),
        ("a.txt", b"abc\xffd", "a.txt is not UTF-8 at byte 3 (0xff)"),
        ("a.jsonl", b'"ok"\n"\xc3("\n', "a.jsonl is not UTF-8 at byte 6 (0xc3)"),
        ("a.jsonl.gz", gzip.compress(b'"\xff"'), "at byte 1 of its unpacked content"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2 is not valid JSON (Expecting value"),
        (
            "a.jsonl",
            b'{"txt": "a", "id": 1}\n',
            "a.jsonl:1 has no key 'text' (keys found: txt, id): name the key",
        ),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1 holds a int"),
        ("a.jsonl", b'{"text": ["a", 5]}\n', "a.jsonl:1 holds a list"),
        ("a.jsonl", b"\n[1]\n", "a.jsonl:2 holds a list"),
        ("a.jsonl", b'"\\ud800"\n', "a.jsonl:1 holds half of a surrogate pair"),
        ("a.jsonl", b"[" * 200_000 + b"\n", "a.jsonl:1 "),
        ("a.jsonl", b'\n""\n', "there is no document in"),
        ("a.txt", b"", "there is no document in"),
        ("a.txt.gz", gzip.compress(b"some text" * 99)[:-9], "damaged or truncated"),
        ("a.jsonl.gz", b"no gzip", "damaged or truncated"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(iter_documents([tmp_path / name]))
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.zst"])
def test_truncated_zstandard_is_named(tmp_path: Path, name: str) -> None:
    packed = zstd(JSONL)
    for content in (packed[:-3], packed[: len(packed) // 2], b"no zstandard"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="damaged or truncated"):
            list(iter_documents([tmp_path / name]))


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt does not exist"):
        list(iter_documents([tmp_path / "none.txt"]))
    with pytest.raises(UserError, match="holds no text"):
        list(iter_documents([tmp_path]))
    with pytest.raises(UserError, match="no document in nothing"):
        list(iter_documents([]))


def test_reading_is_lazy(tmp_path: Path) -> None:
    """A fault far into a file does not keep the documents before it back."""
    (tmp_path / "a.jsonl").write_bytes(b'"one"\n' * 5 + b"{\n")
    documents = iter_documents([tmp_path / "a.jsonl"])
    assert [next(documents).text for _ in range(5)] == ["one"] * 5
