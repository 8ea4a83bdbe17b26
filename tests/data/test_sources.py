"""Reading text: every packing, and every fault named with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from castalia.data.sources import Document, SourceOptions, describe_inputs, documents_of, iter_blocks, iter_documents
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
        ("a.jsonl.gz", gzip.compress(b'"\xff"', mtime=0), "at byte 1 of its unpacked content"),
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
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-9], "damaged or truncated"),
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


def texts_of(*inputs: object, **options: object) -> list[str]:
    return [d.text for d in iter_documents([str(i) for i in inputs], options=SourceOptions(**options))]  # type: ignore[arg-type]


# -- blocks ----------------------------------------------------------------------------------


def test_blocks_are_a_function_of_inputs_and_size(tmp_path: Path) -> None:
    rows = [{"text": "w" * (n % 97) + f" {n}\n"} for n in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for n in range(50):
        (tmp_path / f"c{n:02d}.txt").write_text(f"file {n}")
    whole = [d.text for d in iter_documents([tmp_path])]
    for size in (1, 1000, 10_000, 1 << 22):
        blocks = list(iter_blocks([tmp_path], block_size=size))
        assert [b.number for b in blocks] == list(range(len(blocks)))
        assert all(pickle.loads(pickle.dumps(b)) == b for b in blocks[:3])
        assert list(iter_blocks([tmp_path], block_size=size, skip=len(blocks) // 2)) == blocks[len(blocks) // 2 :]
        assert [d.text for b in blocks for d in documents_of(b, SourceOptions())] == whole
        if size == 10_000:
            assert all(len(b.data) < size for b in blocks) and len(blocks) > 10
    assert len(list(iter_blocks([tmp_path]))) == 3  # one of each .jsonl, and the small files together


def test_places_do_not_depend_on_blocks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n"one"\n\n' + b'"two"\n' * 500 + b"{bad}\n")
    for size in (1, 64, 1 << 20):
        documents = iter_blocks([tmp_path / "a.jsonl"], block_size=size)
        found = []
        with pytest.raises(UserError, match=r"a\.jsonl:504 is not valid JSON"):
            for block in documents:
                found += [d.number for d in documents_of(block, SourceOptions())]
        assert found == [1, *range(3, 3 + len(found) - 1)][: len(found)]


def test_a_document_larger_than_a_block(tmp_path: Path) -> None:
    texts = ["a", "b" * 50_000, "c"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    sizes = [len(b.data) for b in iter_blocks([tmp_path / "a.jsonl"], block_size=1000)]
    assert sum(sizes) == (tmp_path / "a.jsonl").stat().st_size and texts_of(tmp_path / "a.jsonl") == texts


def test_absurd_content_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    """Half a gigabyte of zeros packs to nearly nothing."""
    zeros = b"\0" * (1 << 20)
    with gzip.open(tmp_path / "a.txt.gz", "wb", 1) as file:
        for _ in range(64):
            file.write(zeros)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", zeros * 64)
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(b'"' + zeros * 64))
    (tmp_path / "a.json.xz").write_bytes(lzma.compress(b'["' + b"x" * (1 << 23), preset=0))
    for name in ("a.txt.gz", "a.zip", "a.jsonl.zst", "a.json.xz"):
        tracemalloc.start()
        with pytest.raises(UserError, match="a single document of more than 1,000,000 bytes"):
            texts_of(tmp_path / name, max_document=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 3e7, name
        tracemalloc.stop()


# -- kinds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"text": "a"}, "b", {"text": ["c", "d"]}]', ["a", "b", "c\n\nd"]),
        (b'{\n "text": "one object",\n "n": 1\n}\n', ["one object"]),
        (b'{"text": "line one"}\n{"text": "line two"}\n', ["line one", "line two"]),
        ('\ufeff[\n"ä",\n"\\u00e9 \\ud83d\\ude00"]  \n'.encode(), ["ä", "é 😀"]),
        (b'{"text": "beside", "nan": NaN, "big": 123456789012345678901234567890}', ["beside"]),
    ],
)
def test_json(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(content))
    assert texts_of(tmp_path / "a.json") == texts_of(tmp_path / "b.json.gz") == expected


def test_json_over_many_reads(tmp_path: Path) -> None:
    texts = [f'{n} "quoted" \\ é 😀 ' + "y" * (n * 37 % 9000) for n in range(300)]
    (tmp_path / "a.json").write_text(json.dumps(texts, indent=1, ensure_ascii=False))
    assert texts_of(tmp_path / "a.json") == texts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'["a", "b"', "a.json, value 1"),
        ("a.json", b'["a" "b"]', "a.json, value 0 has neither a comma"),
        ("a.json", b'["a"] "b"', "goes on after its array"),
        (
            "a.json",
            b'["a", {"text": tru}]' + b" " * 99,
            "value 1 is not valid JSON (Expecting value after 9 characters",
        ),
        ("a.json", b'["a", "\xff"]', "a.json is not UTF-8 at byte 7 (0xff)"),
        ("a.json", b'["a", 5]', "value 1 holds a int"),
        ("a.csv", b"id,body\n1,a\n", "no column 'text' (columns found: id, body)"),
        ("a.csv", b'id,text\n1,"a\nb"\n2,c,d\n', "a.csv:4 has 3 fields where the header has 2"),
        ("a.csv", b'id,text\n1,"open\n', "a.csv:2 is not valid CSV"),
        ("a.dat", b"%016d" % 9 + b"short", "record 0: 5 of 9 bytes are there"),
        ("a.dat", b"%016d" % 1 + b"x" + b"junk", "record 1"),
        ("a.jsonl.xz", lzma.compress(b'"a"\n')[:-1], "damaged or truncated"),
        ("a.jsonl.gz", b"", "the packed data has no end"),
        ("a.jsonl.gz", gzip.compress(b'"a"\n', mtime=0) + b"junk", "damaged or truncated"),
        ("a.parquet", b"PAR1 no parquet PAR1", "a.parquet is damaged or truncated"),
        ("a.arrow", b"no arrow", "a.arrow is damaged or truncated"),
        ("a.zip", b"PK no zip", "a.zip is damaged or truncated"),
    ],
)
def test_more_faults_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        texts_of(tmp_path / name)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


def test_csv(tmp_path: Path) -> None:
    rows = [(n, f'a "{n}", b\nsecond line' * (n % 5), "x") for n in range(300)]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("id", "the\ntext", "z"), *rows, (9, "ä" * 200_000, "x")])
    expected = [text for _, text, _ in rows if text] + ["ä" * 200_000]
    for size in (1, 500, 1 << 20):
        options = SourceOptions(text_key="the\ntext")
        blocks = iter_blocks([tmp_path / "a.csv"], options, size)
        assert [d.text for b in blocks for d in documents_of(b, options)] == expected


def test_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = ["one", None, "", "zwölf"] * 700
    parts = [["a", "b"], None, [], ["c"]] * 700
    table = pa.table(
        {"text": texts, "parts": parts, "kind": pa.array(["x", "y"] * 1400).dictionary_encode(), "n": range(2800)}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=900)
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table.slice(1), max_chunksize=100)
    for name, skipped in (("a.parquet", 0), ("a.arrow", 1)):
        documents = list(iter_documents([tmp_path / name]))
        assert [d.text for d in documents] == [t for t in texts[skipped:] if t]
        assert [(d.number, d.bytes) for d in documents[:2]] == ([(0, 3), (3, 6)] if not skipped else [(2, 6), (3, 3)])
        assert texts_of(tmp_path / name, text_key="parts") == ["a\n\nb", "c"] * 700 if not skipped else True
        assert texts_of(tmp_path / name, text_key="kind")[:2] == (["x", "y"] if not skipped else ["y", "x"])
        with pytest.raises(UserError, match="no column 'body' .columns found: text, parts, kind, n."):
            texts_of(tmp_path / name, text_key="body")
        with pytest.raises(UserError, match="holds int64 where text was expected"):
            texts_of(tmp_path / name, text_key="n")


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    """Its layout: shards in the order of state.json, caches beside them, one folder for each split."""
    pa = pytest.importorskip("pyarrow")
    for split, shards in (("train", ["b", "a"]), ("test", ["t"])):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        for shard in [*shards, "cache-1"]:
            table = pa.table({"text": [f"{shard} {n}" for n in range(3)]})
            with pa.ipc.new_stream(folder / f"{shard}.arrow", table.schema) as writer:
                writer.write_table(table)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": f"{s}.arrow"} for s in shards]}))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts_of(tmp_path / "saved" / "train") == ["b 0", "b 1", "b 2", "a 0", "a 1", "a 2"]
    with pytest.raises(UserError, match="holds the splits train, test: name one"):
        texts_of(tmp_path / "saved")


# -- archives --------------------------------------------------------------------------------


def tar(members: dict[str, bytes], **how: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **how) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return file.getvalue()


MEMBERS = {"a/one.txt": b"one", "b.md": "zwölf".encode(), "empty": b"", "c.jsonl": b'"x"\n"y"\n', "z" * 300: b"last"}


def test_tar_and_zip(tmp_path: Path) -> None:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("folder") if hasattr(archive, "mkdir") else None
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    packings = {
        "a.tar": bytes,
        "b.tar.gz": gzip.compress,
        "b.tgz": gzip.compress,
        "c.tar.xz": lzma.compress,
        "d.tar.zst": zstd,
    }
    files = {name: pack(tar(MEMBERS)) for name, pack in packings.items()} | {"e.zip": zipped.getvalue()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        documents = list(iter_documents([tmp_path / name]))
        assert [d.text for d in documents] == ["one", "zwölf", "x", "y", "last"], name
        assert [d.member for d in documents] == ["a/one.txt", "b.md", "c.jsonl", "c.jsonl", "z" * 300]
        assert {d.source for d in documents} == {str(tmp_path / name)}


def test_the_archives_of_lm_dataformat(tmp_path: Path) -> None:
    """Its reader's kinds of names, and what each holds."""
    lines = b'{"text": "one", "meta": {}}\n{"text": ["two", "three"]}\n'
    dat = b"".join(b"%016d" % len(t) + t for t in (b"one", b"two\n\nthree"))
    texts = {"1.txt": b"one", "2.txt": b"two\n\nthree"}
    files = {
        "data_0_time1_x.jsonl.zst": zstd(lines),
        "x.dat.zst": zstd(dat),
        "x.jsonl.zst.tar": tar({"data_0.jsonl.zst": zstd(lines)}),
        "x.json.zst": zstd(b'["one", "two\\n\\nthree"]'),
        "x.json.gz": gzip.compress(lines),  # C4: GPT-NeoX's reader gives dictionaries here
        "openwebtext.tar.xz": lzma.compress(tar({"openwebtext/urlsf_subset00-1_data.xz": lzma.compress(tar(texts))})),
        "urlsf_subset00-1_data.xz": lzma.compress(tar(texts)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert texts_of(tmp_path / name) == ["one", "two\n\nthree"], name
    (tmp_path / "old.gz").write_bytes(gzip.compress(b"a line\nanother", mtime=0))
    assert texts_of(tmp_path / "old.gz") == ["a line\n", "another"]
    assert len(texts_of(tmp_path)) == 2 * len(files)  # and old.gz is not taken from a folder


def test_faults_in_archives_name_the_member(tmp_path: Path) -> None:
    for members, words in (
        ({"ok": b"x", "bad.bin": b"a\xff"}, "a.tar!bad.bin is not UTF-8 at byte 1"),
        ({"d.jsonl": b'"x"\n{\n'}, "a.tar!d.jsonl:2 is not valid JSON"),
        ({"d.jsonl.gz": b"junk"}, "a.tar!d.jsonl.gz is damaged"),
    ):
        (tmp_path / "a.tar").write_bytes(tar(members))
        with pytest.raises(UserError) as caught:
            texts_of(tmp_path / "a.tar")
        assert words in str(caught.value)
    whole = tar({"a": b"x" * 600, "b": b"y" * 600})
    damaged = bytearray(whole)
    damaged[1536 + 3] ^= 1  # in the second header: to tarfile alone, the end of the archive
    for content in (bytes(damaged), whole[:1536], whole[:2200], whole[:3072]):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar.* is damaged or truncated"):
            texts_of(tmp_path / "a.tar")
    inner = tar({"deep": b"x"})
    for _ in range(4):
        inner = tar({"in.tar": inner})
    (tmp_path / "a.tar").write_bytes(inner)
    with pytest.raises(UserError, match="archives lie in archives"):
        texts_of(tmp_path / "a.tar")


# -- where inputs lie ------------------------------------------------------------------------


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, content in (
        ("jsonl", b'"a"\n"b"\n'),
        ("json.gz", gzip.compress(b'["a", "b"]', mtime=0)),
        ("tar", tar({"1": b"a", "2": b"b"})),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert texts_of("-", stdin=kind) == ["a", "b"]
    with pytest.raises(UserError, match="can be read only once"):
        texts_of("-", "-")
    with pytest.raises(UserError, match="standard input has an unknown ending"):
        texts_of("-", stdin="pdf")


def test_globs_and_descriptions(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "no[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(name))
    assert texts_of(tmp_path / "?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert texts_of(tmp_path / "**" / "c.*") == ["deep/c.jsonl"]
    assert texts_of(tmp_path / "no[1].jsonl") == ["no[1].jsonl"]  # a name that exists is no pattern
    with pytest.raises(UserError, match="matches no file"):
        texts_of(tmp_path / "*.csv")
    described = describe_inputs([tmp_path / "a.jsonl", "-"])
    assert described[0]["bytes"] == 9 and described[0]["mtime_ns"] == (tmp_path / "a.jsonl").stat().st_mtime_ns
    assert described[1] == {"name": "-", "bytes": None, "mtime_ns": None}


def test_cleaning(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"e\\u0301"\n"\\ufb01 plain"\n')
    assert texts_of(tmp_path / "a.jsonl") == ["e\u0301", "\ufb01 plain"]
    assert texts_of(tmp_path / "a.jsonl", normalise="NFC") == ["\u00e9", "\ufb01 plain"]
    documents = list(iter_documents([tmp_path / "a.jsonl"], options=SourceOptions(normalise="NFKC")))
    assert [(d.text, d.bytes) for d in documents] == [("\u00e9", 2), ("fi plain", 8)]
    with pytest.raises(UserError, match="unknown Unicode normalisation 'NFX'"):
        SourceOptions(normalise="NFX")
    ftfy = pytest.importorskip("ftfy")
    (tmp_path / "b.txt").write_text("schÃ¶n &lt; schoen")
    assert texts_of(tmp_path / "b.txt", ftfy=True) == [ftfy.fix_text("schÃ¶n &lt; schoen")] == ["schön < schoen"]
