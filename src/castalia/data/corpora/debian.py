"""Debian packages -> one .jsonl file of the manuals in them.

    dists/SUITE/Release ──sha256──> Packages.xz ──name, size, sha256──> pool/...deb
        ──ar──> tar ──texts by their paths──> debian-docs.jsonl

Nothing is installed, and no tool of Debian's is needed. Each step is checked by the sums of
the one before; `Release` itself is trusted as the mirror gives it (by https, unless the
mirror that is asked for is not).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from castalia.data.corpora.download import Progress, download
from castalia.data.corpora.stdlib import write_documents
from castalia.data.sources.archives import tar_members
from castalia.data.sources.unpack import Plain, read_all, unpacked
from castalia.errors import UserError

SUITE = "bookworm"
MIRRORS = ("https://deb.debian.org/debian", "https://archive.debian.org/debian")
# Sources of manuals, not their HTML: package -> the paths that are taken.
PACKAGES = {
    "anarchism": r"/markdown/.*\.md(\.gz)?$",
    "debian-policy": r"/_sources/.*\.txt$",
    "debian-reference-en": r"\.txt\.gz$",
    "developers-reference": r"/_sources/.*\.txt$",
    "linux-doc-6.1": r"/_sources/.*\.rst\.txt$",
    "perl-doc": r"\.pod$",
    "python3.11-doc": r"/_sources/.*\.rst\.txt$",
    "vim-runtime": r"/doc/.*\.txt$",
}
_LARGEST = 1 << 27  # bytes of one text
_INDEX = "main/binary-amd64/Packages.xz"


def write_debian_docs(
    target: Path,
    mirrors: tuple[str, ...] = MIRRORS,
    packages: dict[str, str] | None = None,
    report: Callable[[str], Progress | None] = lambda name: None,
) -> dict[str, int]:
    """Fetch the packages into a folder beside `target`, and write their texts to it.

    Args:
        target: the .jsonl file.
        mirrors: of Debian; the first that answers is taken for each file.
        packages: name -> pattern of the paths of texts; None: `PACKAGES`.
        report: gives the progress callback for a file's name.

    Returns:
        Number of `documents` and UTF-8 `bytes` of text.
    """
    packages = PACKAGES if packages is None else packages
    folder = target.parent / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    index = _index(folder, mirrors, report)
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    for name, pattern in sorted(packages.items()):
        if name not in index:
            raise UserError(f"Debian {SUITE} has no package {name} any more: name another mirror with --mirror")
        entry = index[name]
        file = folder / entry["Filename"].rsplit("/", 1)[-1]
        urls = [f"{mirror}/{entry['Filename']}" for mirror in mirrors]
        download(urls, file, int(entry["Size"]), entry["SHA256"], progress=report(file.name))
        for path, text in sorted(package_texts(file, re.compile(pattern))):
            if text.strip() and text not in seen:
                seen.add(text)
                found.append((f"{name}/{path}", text))
    write_documents(target, found)
    return {"documents": len(found), "bytes": sum(len(text.encode()) for _, text in found)}


def _index(
    folder: Path, mirrors: tuple[str, ...], report: Callable[[str], Progress | None]
) -> dict[str, dict[str, str]]:
    """Fields of each package in the suite, by name."""
    release = folder / "Release"
    download([f"{m}/dists/{SUITE}/Release" for m in mirrors], release, overwrite=True, progress=report("Release"))
    match = re.search(rf"^ ([0-9a-f]{{64}}) +(\d+) {re.escape(_INDEX)}$", release.read_text("utf-8", "replace"), re.M)
    if match is None:
        raise UserError(f"{release} names no {_INDEX}: the mirror is not one of Debian; name another with --mirror")
    packed = folder / "Packages.xz"
    urls = [f"{m}/dists/{SUITE}/{_INDEX}" for m in mirrors]
    download(urls, packed, int(match[2]), match[1], overwrite=packed.exists(), progress=report("Packages.xz"))
    with open(packed, "rb") as file:
        content = read_all(unpacked(Plain(file, str(packed)), ".xz", str(packed)), 1 << 28)
    index = {}
    for entry in (content or b"").decode("utf-8", "replace").split("\n\n"):
        fields = dict(re.findall(r"^(Package|Filename|Size|SHA256): (.*)$", entry, re.M))
        if len(fields) == 4:
            index[fields["Package"]] = fields
    return index


def package_texts(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Path and text of the files of a package whose paths match; .gz is unpacked, what is no UTF-8 is left out.

    A package is an `ar` archive (deb(5)): a line, then members of 60 bytes of header each and an
    even number of bytes.
    """
    with open(path, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise UserError(f"{path} is no Debian package: remove it and fetch it again")
        while len(header := file.read(60)) == 60:
            name = header[:16].decode("ascii", "replace").strip().rstrip("/")
            size = int(header[48:58])
            stem, tar, packing = name.partition(".tar")
            if stem == "data" and tar:
                content = unpacked(Plain(io.BytesIO(file.read(size)), str(path)), packing, str(path))
                for member, text in tar_members(content, str(path)):
                    if not pattern.search(member):
                        continue
                    inner = ".gz" if member.endswith(".gz") else ""
                    data = read_all(unpacked(text, inner, f"{path}!{member}"), _LARGEST)
                    try:
                        yield member.removeprefix("./"), (data or b"").decode("utf-8")
                    except UnicodeDecodeError:
                        continue
                return
            file.seek(size + size % 2, 1)
    raise UserError(f"{path} has no data: remove it and fetch it again")
