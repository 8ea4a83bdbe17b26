"""Addresses -> one whole file, or an error; never half a file under the final name.

    GET, Range: what is missing ──> NAME.part ──size, checksum, fsync──> NAME
         └── dropped, truncated, 5xx: again, from where it stopped, after a pause that grows

What is known of the remote file when a download begins is kept in NAME.part.json, so that a
part is only gone on with if it is of the same file (RFC 9110, section 14: If-Range).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from castalia.errors import UserError

ATTEMPTS = 6  # in a row that bring nothing
TIMEOUT = 60.0  # seconds without a byte
_CHUNK = 1 << 18
_FLEETING = (408, 425, 429, 500, 502, 503, 504)

Progress = Callable[[int, int | None], None]  # bytes there, bytes in all where known


class _Refused(Exception):
    """This address does not give the file, and asking again would not help."""


class _Dropped(Exception):
    """The transfer broke off; asking again may help."""


def download(
    urls: Sequence[str],
    target: str | os.PathLike[str],
    size: int | None = None,
    sha256: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> bool:
    """Fetch a file from the first of the addresses that gives it whole.

    Args:
        urls: http or https.
        target: the final name.
        size: bytes it must have, where known.
        sha256: what it must hash to, where known.
        overwrite: fetch anew what is there.
        progress: called now and then.
        wait: pauses for so many seconds.

    Returns:
        False where the file was there already, True where it was fetched.

    Raises:
        UserError: no address gives it, what they give is something else, or another process is at it.
    """
    path = Path(target)
    if path.exists() and not overwrite:
        if fault := _fault(path, size, sha256):
            raise UserError(f"{path} exists and is not the file wanted ({fault}): remove it, or say --overwrite")
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    faults = []
    with _locked(part) as file:
        for url in urls:
            try:
                _fetch(url, part, file, size, progress, wait)
                if fault := _fault(part, size, sha256):
                    raise _Refused(fault)
            except _Refused as error:
                _forget(part, file)
                faults.append(f"{url}: {error}")
            except _Dropped as error:  # what is there stays, to go on with
                faults.append(f"{url}: {error}")
            else:
                os.fsync(file.fileno())
                os.replace(part, path)
                _notes(part).unlink(missing_ok=True)
                return True
        if not file.seek(0, os.SEEK_END):
            part.unlink()
            _notes(part).unlink(missing_ok=True)
    raise UserError(
        f"{path.name} cannot be fetched ({'; '.join(faults)}): try again later, or put the file there yourself"
    )


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[IO[bytes]]:
    with open(part, "ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{part} is being written by another process: let it finish") from None
        yield file


def _notes(part: Path) -> Path:
    return Path(f"{part}.json")


def _forget(part: Path, file: IO[bytes]) -> None:
    file.truncate(0)
    _notes(part).unlink(missing_ok=True)


def _fault(path: Path, size: int | None, sha256: str | None) -> str:
    """What is wrong with a file, or ""."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"{found:,} bytes instead of {size:,}"
    if sha256 is not None:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            return f"its SHA-256 is {digest} instead of {sha256}"
    return ""


def _fetch(
    url: str,
    part: Path,
    file: IO[bytes],
    size: int | None,
    progress: Progress | None,
    wait: Callable[[float], None],
) -> None:
    """Fetch until the file is whole, as far as the server says how long it is."""
    vain = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            _transfer(url, part, file, size, progress)
            return
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in _FLEETING:
                    raise _Refused(f"HTTP {error.code} {error.reason}") from None
                fault = f"HTTP {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # of this machine's disk
            reason = getattr(error, "reason", error)
            fault = str(reason) or type(reason).__name__
        except _Dropped as error:
            fault = str(error)
        vain = 0 if file.seek(0, os.SEEK_END) > before else vain + 1
        if vain >= ATTEMPTS:
            raise _Dropped(f"{fault}, {ATTEMPTS} times in a row")
        wait(min(60.0, 2.0**vain))


def _transfer(url: str, part: Path, file: IO[bytes], size: int | None, progress: Progress | None) -> None:
    """One request: appends to the file what it brings."""
    if not url.startswith(("http://", "https://")):
        raise _Refused("no address of http or https")
    have = file.seek(0, os.SEEK_END)
    known = _known(part, url)
    request = urllib.request.Request(url, headers={"User-Agent": "castalia", "Accept-Encoding": "identity"})
    if have and known is None and size is None:
        _forget(part, file)  # nothing says that it is a part of the same file
        have = 0
    if have:
        request.add_header("Range", f"bytes={have}-")
        if known and known.get("tag"):
            request.add_header("If-Range", known["tag"])
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        total = _total(error.headers, 0)
        if have == (size if size is not None else total):
            return
        _forget(part, file)
        raise _Dropped("what was there is no part of the file any more") from None
    with answer:
        headers = answer.headers
        if headers.get_content_type() == "text/html":
            raise _Refused("a web page instead of a file, as of a host that has gone")
        start = have if answer.status == 206 else 0
        if answer.status == 206 and not (headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            _forget(part, file)
            raise _Dropped("another part than was asked for")
        if start < have:  # the server knows no ranges, or the file has changed
            _forget(part, file)
        total = _total(headers, start)
        wanted = size if size is not None else (known or {}).get("total") if start else None
        if total is not None and wanted is not None and total != wanted:
            raise _Refused(f"the server's file has {total:,} bytes instead of {wanted:,}")
        tag = headers.get("ETag") or ""
        note = {
            "url": url,
            "total": total,
            "tag": "" if tag.startswith("W/") else tag or headers.get("Last-Modified") or "",
        }
        _notes(part).write_text(json.dumps(note))
        there = start
        while chunk := answer.read(_CHUNK):
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(part)) from None
            there += len(chunk)
            if size is not None and there > size:
                raise _Refused(f"more than {size:,} bytes")
            if progress is not None:
                progress(there, total if total is not None else size)
        expected = total if total is not None else size
        if expected is not None and there < expected:
            raise _Dropped(f"the connection ended after {there:,} of {expected:,} bytes")


def _known(part: Path, url: str) -> dict[str, Any] | None:
    """What was noted of the remote file when its part was begun from the same address."""
    try:
        note = json.loads(_notes(part).read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and note.get("url") == url else None


def _total(headers: Any, start: int) -> int | None:
    """Bytes of the whole remote file, where the answer says it."""
    if match := re.search(r"/(\d+)\s*$", headers.get("Content-Range") or ""):
        return int(match[1])
    length = headers.get("Content-Length") or ""
    return start + int(length) if length.isdigit() else None
