"""Downloads against a server that misbehaves: the file comes whole, or not at all and with a reason."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from castalia.data.corpora import download as module
from castalia.data.corpora.download import ATTEMPTS, download
from castalia.errors import UserError

CONTENT = hashlib.shake_128(b"corpus").digest(1_000_003)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Behaviour:
    """What the server does; `requests` are the ranges that it was asked for."""

    content: bytes = CONTENT
    etag: str = '"one"'
    drops: list[int] = field(default_factory=list)  # bytes of each next answer, before the connection breaks
    codes: list[int] = field(default_factory=list)  # of the next answers
    ranges: bool = True
    length: bool = True
    wrong_range: bool = False
    kind: str = "application/octet-stream"
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[tuple[str, Behaviour]]:
    behaviour = Behaviour()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/file")
                self.end_headers()
                return
            b = behaviour
            asked = self.headers.get("Range") or ""
            b.requests.append(asked)
            if self.path == "/missing" or b.codes:
                self.send_error(404 if self.path == "/missing" else b.codes.pop(0))
                return
            start = 0
            if asked and b.ranges and self.headers.get("If-Range") in (None, b.etag):
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
                if start >= len(b.content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(b.content)}")
                    self.end_headers()
                    return
                self.send_response(206)
                shown = 0 if b.wrong_range else start
                self.send_header("Content-Range", f"bytes {shown}-{len(b.content) - 1}/{len(b.content)}")
            else:
                self.send_response(200)
            if b.length:
                self.send_header("Content-Length", str(len(b.content) - start))
            self.send_header("Content-Type", b.kind)
            self.send_header("ETag", b.etag)
            self.end_headers()
            self.wfile.write(b.content[start : start + b.drops.pop(0)] if b.drops else b.content[start:])

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", behaviour
        httpd.shutdown()
        thread.join()


def waits() -> tuple[list[float], Callable[[float], None]]:
    seen: list[float] = []
    return seen, seen.append


def whole(path: Path) -> None:
    assert path.read_bytes() == CONTENT
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_a_good_server(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    seen: list[tuple[int, int | None]] = []
    target = tmp_path / "new" / "a.bin"
    assert download([url + "moved"], target, len(CONTENT), SHA256, progress=lambda *n: seen.append(n))
    whole(target)
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert not download([url + "missing"], target)  # it is there: nothing is asked
    assert behaviour.requests == [""]
    behaviour.content = b"newer"
    assert download([url + "file"], target, overwrite=True)
    assert target.read_bytes() == b"newer"


def test_dropped_connections_go_on_where_they_broke(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    behaviour.drops = [300_000, 0, 0, 250_000]
    behaviour.codes = [503]
    pauses, wait = waits()
    assert download([url + "file"], tmp_path / "a", sha256=SHA256, wait=wait)
    whole(tmp_path / "a")
    assert behaviour.requests == ["", "", *["bytes=300000-"] * 3, "bytes=550000-"]
    assert pauses == [2, 1, 2, 4, 1]


def test_a_server_without_ranges_starts_anew(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    behaviour.drops, behaviour.ranges = [300_000], False
    assert download([url + "file"], tmp_path / "a", sha256=SHA256, wait=waits()[1])
    whole(tmp_path / "a")


def test_a_server_that_gives_another_range_is_not_believed(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    behaviour.drops, behaviour.wrong_range = [300_000], True
    assert download([url + "file"], tmp_path / "a", wait=waits()[1])
    whole(tmp_path / "a")
    assert behaviour.requests == ["", "bytes=300000-", ""]


def test_an_interrupted_download_is_gone_on_with(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    behaviour.drops = [400_000] + [0] * ATTEMPTS
    pauses, wait = waits()
    with pytest.raises(UserError, match=rf"400,000 of 1,000,003 bytes, {ATTEMPTS} times in a row"):
        download([url + "file"], tmp_path / "a", wait=wait)
    assert len(pauses) == ATTEMPTS and not (tmp_path / "a").exists()
    assert (tmp_path / "a.part").stat().st_size == 400_000
    assert download([url + "file"], tmp_path / "a", wait=wait)
    whole(tmp_path / "a")
    assert behaviour.requests[-1] == "bytes=400000-"


def test_a_part_of_an_older_file_is_thrown_away(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    behaviour.content, behaviour.etag, behaviour.drops = b"o" * 1_000_003, '"old"', [5000] + [0] * ATTEMPTS
    with pytest.raises(UserError):
        download([url + "file"], tmp_path / "a", wait=waits()[1])
    behaviour.content, behaviour.etag = CONTENT, '"one"'
    assert download([url + "file"], tmp_path / "a", wait=waits()[1])
    whole(tmp_path / "a")


def test_a_whole_part_needs_no_more_bytes(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    """A kill between the last byte and the final name."""
    url, behaviour = server
    (tmp_path / "a.part").write_bytes(CONTENT)
    (tmp_path / "a.part.json").write_text(json.dumps({"url": url + "file", "total": len(CONTENT), "tag": '"one"'}))
    assert download([url + "file"], tmp_path / "a", sha256=SHA256)
    whole(tmp_path / "a")


def test_wrong_content_is_not_kept(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    for size, sha256, words in (
        (None, "0" * 64, f"its SHA-256 is {SHA256} instead of 000"),
        (999, None, "has 1,000,003 bytes instead of 999"),
    ):
        with pytest.raises(UserError, match=words):
            download([url + "file"], tmp_path / "a", size, sha256)
        assert list(tmp_path.iterdir()) == []
    behaviour.length = False  # nothing but the size wanted tells that it broke off
    behaviour.drops = [1000] * 2
    assert download([url + "file"], tmp_path / "a", len(CONTENT), wait=waits()[1])
    whole(tmp_path / "a")


def test_mirrors(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    with pytest.raises(UserError, match=r"missing: HTTP 404 .*; ftp://b/c: no address of http or https"):
        download([url + "missing", "ftp://b/c"], tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    assert download([url + "missing", "http://127.0.0.1:1/", url + "file"], tmp_path / "a", wait=waits()[1])
    whole(tmp_path / "a")


def test_a_parked_host_is_told_from_a_file(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    behaviour.kind = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="a web page instead of a file"):
        download([url + "file"], tmp_path / "a")


def test_what_is_there_is_not_replaced(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, _ = server
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists and is not the file wanted"):
        download([url + "file"], tmp_path / "a", len(CONTENT))
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_two_processes_do_not_write_one_file(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    with open(tmp_path / "a.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="written by another process"):
            download([server[0] + "file"], tmp_path / "a")


def test_a_full_disk_is_no_fault_of_the_server(
    server: tuple[str, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "a.part")

    monkeypatch.setattr(module, "_transfer", full)
    with pytest.raises(OSError, match="No space"):
        download([server[0] + "file"], tmp_path / "a", wait=waits()[1])
