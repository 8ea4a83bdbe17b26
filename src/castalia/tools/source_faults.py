"""Damaged corpora by the thousand: each is read rightly or refused with a sentence.

    valid files of every kind ──a bit, a byte, a stretch changed, cut off or put in──> read
        ──> documents that are text  |  UserError;  never another error, a hang, or silence

Where the format has a checksum over the content (gzip, xz, zstandard, zip), silence would be
to give other texts than the original ones, and is looked for. Run it by
`python -m castalia.tools.certify source_mutations`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import random
import signal
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from castalia.data.sources import SourceOptions, documents_of, iter_blocks
from castalia.errors import CheckFailed, UserError

MUTATIONS = 12_000
LIMIT = 20  # seconds for a file of some kilobytes: what takes longer hangs
_CHECKED = (".gz", ".xz", ".zst", ".zst.tar", ".zip")
TEXTS = ["a plain text\nof two lines\n", 'quotes " and, commas', "zwölf Wörter, 日本語 🙂", "x" * 700, "{}[]\\", "end"]


def valid_files() -> dict[str, bytes]:
    """Name and content of one small file of each kind, all with `TEXTS` for documents."""
    import zstandard

    zstd = zstandard.ZstdCompressor(write_checksum=True).compress
    jsonl = "".join(
        json.dumps({"text": t, "meta": {"n": [1, None]}}, ensure_ascii=False) + "\n" for t in TEXTS
    ).encode()
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("id", "text"), *enumerate(TEXTS)])
    dat = b"".join(b"%016d" % len(t.encode()) + t.encode() for t in TEXTS)
    members = {f"{n}.txt": t.encode() for n, t in enumerate(TEXTS)}
    files = {
        "a.jsonl": jsonl,
        "a.json": json.dumps([{"text": t} for t in TEXTS], ensure_ascii=False, indent=1).encode(),
        "a.csv": table.getvalue().encode(),
        "a.jsonl.gz": gzip.compress(jsonl),
        "a.jsonl.xz": lzma.compress(jsonl),
        "a.jsonl.zst": zstd(jsonl),
        "a.json.gz": gzip.compress(jsonl),
        "a.dat.zst": zstd(dat),
        "a.dat": dat,
        "a.tar": _tar(members),
        "a.tar.gz": gzip.compress(_tar(members)),
        "a.jsonl.zst.tar": _tar({"b.jsonl.zst": zstd(jsonl)}),
        "a.zip": _zip(members),
        "b.zip": _zip({"b.jsonl": jsonl}),
    }
    return files | _tables()


def _tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            header.pax_headers = {"comment": "ü"}
            archive.addfile(header, io.BytesIO(content))
    return file.getvalue()


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _tables() -> dict[str, bytes]:
    """The kinds of pyarrow, where it is installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return {}
    table = pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    files = {}
    for name, codec in (("a.parquet", "zstd"), ("b.parquet", "none")):
        parquet = io.BytesIO()
        pq.write_table(table, parquet, compression=codec, write_page_checksum=True)
        files[name] = parquet.getvalue()
    for name, new in (("a.arrow", pa.ipc.new_stream), ("b.arrow", pa.ipc.new_file)):
        arrow = io.BytesIO()
        with new(arrow, table.schema) as writer:
            writer.write_table(table)
        files[name] = arrow.getvalue()
    return files


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to three changes at random places."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(data) + 1)
        to = min(len(data), at + draw.choice((1, 1, 4, 16, 200)))
        match draw.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at:to] = draw.randbytes(to - at)
            case 2:
                del data[at:]
            case 3:
                del data[at:to]
            case 4:
                data[at:at] = data[at:to]
            case 5:
                data[at:at] = draw.choice((b"\0" * 16, b'"', b"\n", b"\xff", b"[" * 3000, b"9" * 5000, b"\x80\0\0\0"))
            case _:
                data[at:to] = bytes([draw.choice((0, 0x7F, 0x80, 0xFF))]) * (to - at)
    return bytes(data)


def read_damaged(path: Path, name: str, content: bytes) -> str:
    """Read a damaged file; returns "read" or "refused".

    Raises:
        CheckFailed: it was read to other texts in silence, or took too long. Errors of any other kind
            are let through.
    """
    path.write_bytes(content)
    # A document of this size is far over what is in the files, and shows that sizes in headers are not trusted.
    options = SourceOptions(max_document=1 << 24)
    try:
        with _limited(name):
            texts = [d.text for block in iter_blocks([path], options, 1 << 12) for d in documents_of(block, options)]
    except UserError as error:
        if str(path) not in str(error):
            raise CheckFailed(f"the error about {name} does not name it: {error}") from None
        return "refused"
    for text in texts:
        text.encode()
    # Packed files may follow one another: twice the whole of one is no damage.
    if name.endswith(_CHECKED) and texts != TEXTS * max(1, len(texts) // len(TEXTS)):
        raise CheckFailed(
            f"{name}: {len(texts)} texts were read in silence, which are not the {len(TEXTS)} original ones"
        )
    return "read"


@contextmanager
def _limited(name: str) -> Iterator[None]:
    """Fail after `LIMIT` seconds; in the main thread only, since it takes a signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{name} was not read within {LIMIT} seconds")

    before: Any = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_mutations(folder: Path, mutations: int, seed: int = 0) -> dict[str, Counter[str]]:
    """Damage files so many times, in turn; for each kind, how often it was read and refused."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    files = valid_files()
    found: dict[str, Counter[str]] = {name: Counter() for name in files}
    names = list(files)
    for number in range(mutations):
        name = names[number % len(names)]
        content = mutate(files[name], draw)
        try:
            found[name][read_damaged(folder / name, name, content)] += 1
        except Exception as error:
            kept = folder / f"mutation-{seed}-{number}-{name}"
            kept.write_bytes(content)
            raise CheckFailed(f"{kept} is neither read nor refused: {type(error).__name__}: {error}") from error
    return found
