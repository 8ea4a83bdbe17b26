"""`castalia corpora`: what is listed can be got, whole or not at all, and prepared."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import lzma
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from castalia.cli import main
from castalia.data.corpora import CORPORA
from castalia.data.corpora import debian as debian_module
from castalia.data.corpora import get as get_module
from castalia.data.corpora.debian import PACKAGES
from castalia.data.sources import iter_documents
from castalia.data.sources.inputs import kind_of

# The names that GPT-NeoX's prepare_data.py takes; `pass`, which does nothing, is left out.
GPTNEOX = """enron pile_subset pile github arxiv europarl freelaw nih pubmed books1 books3 hackernews openwebtext2
stackexchange ubuntu_irc youtube_subtitles c4 c4_openwebtext enwik8""".split()


Mirror = tuple[str, dict[str, bytes], list[str]]


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    """Address of a server, the files that it has, and the paths that it was asked for."""
    files: dict[str, bytes] = {}
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = files.get(self.path.lstrip("/"))
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", files, asked
        server.shutdown()
        thread.join()


def test_every_corpus_of_gptneox_is_there_and_can_be_read() -> None:
    assert set(GPTNEOX) <= set(CORPORA)
    for name, corpus in CORPORA.items():
        assert corpus.made or corpus.files, name
        assert len({f.name for f in corpus.files}) == len(corpus.files)
        for file in corpus.files:
            assert file.urls and all(u.startswith(("https://", "http://")) for u in file.urls)
            kind = kind_of(file.name)
            assert kind is not None and kind[0] != "lines", file.name
    counts = {name: len(CORPORA[name].files) for name in ("pile", "pile_subset", "c4", "c4_openwebtext")}
    assert counts == {"pile": 30, "pile_subset": 1, "c4": 1024, "c4_openwebtext": 512}
    assert CORPORA["pile"].files[29].urls[0].endswith("pile/train/29.jsonl.zst")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpora", "list", "--urls"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in CORPORA) and "expect this address to be gone" in shown
    assert main(["corpora", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["enron"]["documents"] == 517_401


def test_get_and_prepare(
    mirror: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, files, asked = mirror
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    corpus = get_module.CORPORA["hackernews"]
    name = corpus.files[0].name
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for n in range(3):
            header = tarfile.TarInfo(f"{n}.txt")
            header.size = 6
            archive.addfile(header, io.BytesIO(b"text %d" % n))
    files[f"copy/{name}"] = packed.getvalue()
    verb = ["corpora", "prepare", "hackernews", "--mirror", f"{url}/copy", "--tokenizer", "byte"]
    assert main([*verb, "--output", str(tmp_path / "tokens")]) == 0
    assert (tmp_path / "hackernews" / name).read_bytes() == packed.getvalue()
    assert json.loads((tmp_path / "tokens.json").read_text())["documents"] == 3
    assert main(["corpora", "get", "hackernews"]) == 0  # it is there, so nothing is asked
    assert len(asked) == 1
    assert main([*verb, "--output", str(tmp_path / "tokens")]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_corpus_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mirror: Mirror, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    file = dataclasses.replace(CORPORA["enron"].files[0], urls=(mirror[0] + "/gone",))
    monkeypatch.setitem(get_module.CORPORA, "enron", dataclasses.replace(CORPORA["enron"], files=(file,)))
    assert main(["corpora", "get", "enron", "--output", str(tmp_path / "enron")]) == 2
    error = capsys.readouterr().err
    assert "/gone: HTTP 404" in error and "expect this address to be gone" in error
    assert list((tmp_path / "enron").iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["get", "enrom"], "unknown corpus 'enrom'; known: stdlib"),
        (["get", "stdlib", "--valid-fraction", "1"], "--valid-fraction 1.0 must lie between 0 and 1"),
        (["get", "stdlib", "--mirror", "http://a"], "has no mirror"),
    ],
)
def test_wrong_requests(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpora", *argv]) == 2
    assert words in capsys.readouterr().err


def test_stdlib_is_not_made_twice(tmp_path: Path) -> None:
    verb = ["corpora", "get", "stdlib", "--output", str(tmp_path)]
    assert main(verb) == 0
    (tmp_path / "train.jsonl").write_text("mine")
    assert main(verb) == 0 and (tmp_path / "train.jsonl").read_text() == "mine"
    assert main([*verb, "--overwrite"]) == 0 and (tmp_path / "train.jsonl").stat().st_size > 1_000_000


# -- Debian ----------------------------------------------------------------------------------


def package(texts: dict[str, bytes]) -> bytes:
    """A package of the given files, as deb(5) has it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in texts.items():
            header = tarfile.TarInfo(f"./{name}")
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": lzma.compress(data.getvalue())}
    deb = b"!<arch>\n"
    for name, content in parts.items():
        deb += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    return deb


def test_debian_docs(
    mirror: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, files, asked = mirror
    monkeypatch.setattr(
        debian_module, "PACKAGES", {"perl-doc": PACKAGES["perl-doc"], "anarchism": PACKAGES["anarchism"]}
    )
    monkeypatch.setattr(get_module, "MIRRORS", ())
    debs = {
        "perl-doc": package(
            {"b.pod": b"perl b", "a.pod": "perl ä".encode(), "c.html": b"no", "d.pod": b"\xff", "e.pod": b"perl b"}
        ),
        "anarchism": package({"markdown/x.md.gz": gzip.compress(b"packed")}),
    }
    index = b""
    for name, deb in debs.items():
        path = f"pool/{name}_1_all.deb"
        files[path] = deb
        digest = hashlib.sha256(deb).hexdigest()
        index += f"Package: {name}\nFilename: {path}\nSize: {len(deb)}\nSHA256: {digest}\n\n".encode()
    packed = lzma.compress(index)
    files["dists/bookworm/main/binary-amd64/Packages.xz"] = packed
    line = f" {hashlib.sha256(packed).hexdigest()} {len(packed)} main/binary-amd64/Packages.xz\n"
    files["dists/bookworm/Release"] = f"Suite: x\nSHA256:\n{line}".encode()
    verb = ["corpora", "get", "debian-docs", "--mirror", url, "--output", str(tmp_path)]
    assert main(verb) == 0
    documents = list(iter_documents([tmp_path / "debian-docs.jsonl"]))
    assert [d.text for d in documents] == ["packed", "perl ä", "perl b"]
    before = len(asked)
    assert main(verb) == 0 and len(asked) == before
    files["pool/perl-doc_1_all.deb"] = debs["anarchism"]
    (tmp_path / "packages" / "perl-doc_1_all.deb").unlink()
    capsys.readouterr()
    assert main([*verb, "--overwrite"]) == 2  # another package than the index says
    assert "instead of" in capsys.readouterr().err
    assert [d.text for d in iter_documents([tmp_path / "debian-docs.jsonl"])] == ["packed", "perl ä", "perl b"]
