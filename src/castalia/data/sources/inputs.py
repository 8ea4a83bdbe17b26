"""What the user names -> the list of files to read, local or remote, in a definite order.

    corpus/  "shards/*.jsonl.zst"  s3://bucket/c4/*.json.gz  https://host/a.txt  -   ──> [Input, ...]

A file's name says how it is packed and what it holds. Folders are searched to any depth in
sorted order; a folder that Hugging Face's `datasets` saved is read in its own order. Remote
files go through fsspec.
"""

from __future__ import annotations

import glob
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.data.sources.blocks import SourceOptions
from castalia.data.sources.unpack import PACKINGS
from castalia.errors import UserError

KINDS = ("txt", "jsonl", "json", "csv", "dat", "tar", "zip", "parquet", "arrow")
_NEVER_PACKED = ("zip", "parquet", "arrow")
_SHORT = {".tgz": ".tar.gz", ".txz": ".tar.xz", ".tzst": ".tar.zst", ".ndjson": ".jsonl"}
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.I)
_MAGIC = re.compile(r"[*?\[]")
_DATASETS_OWN = ("dataset_info.json", "dataset_dict.json", "state.json")  # beside the data of a `datasets` folder


@dataclass(frozen=True, slots=True)
class Input:
    """One file to read.

    Attributes:
        name: path, URL, or "-".
        kind: what it holds, one of `KINDS`, or `lines`.
        packing: one of `PACKINGS` or "".
        size: bytes as stored; None where unknown.
        mtime_ns: when it was changed; None where unknown.
    """

    name: str
    kind: str
    packing: str
    size: int | None = None
    mtime_ns: int | None = None


def kind_of(name: str) -> tuple[str, str] | None:
    """Kind and packing that a file's name says, or None.

    Those of GPT-NeoX's reader (lm_dataformat) are among them: `.jsonl.zst.tar` is a tar, and a
    `.gz` of no known kind holds a document on each line.
    """
    name = name.rsplit("/", 1)[-1].lower()
    for short, long in _SHORT.items():
        name = name.removesuffix(short) + long if name.endswith(short) else name
    packing = next((p for p in PACKINGS if name.endswith(p)), "")
    plain = name.removesuffix(packing)
    kind = plain.rsplit(".", 1)[-1] if "." in plain else ""
    if kind in KINDS and not (packing and kind in _NEVER_PACKED):
        return kind, packing
    if packing == ".xz" and "urlsf_subset" in plain and plain.endswith("_data"):
        return "tar", packing  # the parts of OpenWebText are called so
    return ("lines", packing) if packing == ".gz" and kind not in KINDS else None


def is_url(name: str) -> bool:
    """Whether a name is a URL."""
    return _URL.match(name) is not None


def find_inputs(
    inputs: Iterable[str | os.PathLike[str]] | str | os.PathLike[str], options: SourceOptions | None = None
) -> list[Input]:
    """The files that the names stand for.

    Raises:
        UserError: a name stands for nothing, has an unknown ending, or is a folder without texts.
    """
    if isinstance(inputs, str | os.PathLike):
        inputs = [inputs]
    found: list[Input] = []
    for name in (os.fspath(path) for path in inputs):
        if name == "-":
            found.append(_input("-", f".{(options or SourceOptions()).stdin}"))
        elif is_url(name):
            found += _remote(name)
        else:
            found += _local(name)
    if sum(i.name == "-" for i in found) > 1:
        raise UserError("standard input (-) is named twice, but can be read only once: name it once")
    return found


def describe_inputs(
    inputs: Iterable[str | os.PathLike[str]] | str | os.PathLike[str], options: SourceOptions | None = None
) -> list[dict[str, Any]]:
    """Name, `bytes` as stored, and `mtime_ns` of each file; None where unknown."""
    return [{"name": i.name, "bytes": i.size, "mtime_ns": i.mtime_ns} for i in find_inputs(inputs, options)]


def _input(name: str, ending: str | None = None, size: int | None = None, mtime_ns: int | None = None) -> Input:
    kind = kind_of(ending or name)
    if kind is None:
        known = ", ".join(f".{k}" for k in KINDS)
        raise UserError(
            f"{'standard input' if name == '-' else name} has an unknown ending: texts end in {known}, "
            f"and most of these may be packed as {', '.join(PACKINGS)}"
        )
    return Input(name, *kind, size, mtime_ns)


def _is_text(name: str) -> bool:
    """Whether a file found in a folder is taken: a packed file of no known kind is not."""
    base = name.rsplit("/", 1)[-1]
    kind = kind_of(base)
    return not base.startswith(".") and base not in _DATASETS_OWN and kind is not None and kind[0] != "lines"


# -- local -----------------------------------------------------------------------------------


def _local(name: str) -> list[Input]:
    path = Path(name)
    if path.is_dir():
        return [_local_file(p) for p in _folder(path)]
    if not path.exists():
        matches = sorted(glob.glob(name, recursive=True)) if _MAGIC.search(name) else []
        if not matches:
            what = "matches no file" if _MAGIC.search(name) else "does not exist"
            raise UserError(f"{name} {what}: give files or folders of text")
        return [i for match in matches for i in _local(glob.escape(match) if _MAGIC.search(match) else match)]
    return [_local_file(path)]


def _local_file(path: Path) -> Input:
    status = path.stat()
    regular = path.is_file()  # a pipe has neither size nor time
    return _input(str(path), None, status.st_size if regular else None, status.st_mtime_ns if regular else None)


def _folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        if len(splits) != 1:
            raise UserError(f"{folder} holds the splits {', '.join(splits)}: name one, such as {folder / splits[0]}")
        folder = folder / splits[0]
    if (folder / "state.json").is_file() and "_data_files" in (state := _json(folder / "state.json")):
        return [folder / str(entry["filename"]) for entry in state["_data_files"]]
    found = sorted(p for p in folder.rglob("*") if p.is_file() and _is_text(p.name))
    if not found:
        raise UserError(f"{folder} holds no text: no file below it ends in {', '.join(f'.{k}' for k in KINDS)}")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object, as Hugging Face's datasets writes there: save the data set again")
    return value


# -- remote ----------------------------------------------------------------------------------


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path there."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UserError(f"{url} cannot be read ({error}): pip install 'castalia[remote]'") from None
    except ValueError as error:
        raise UserError(f"{url} cannot be read ({error}): use a kind of URL that fsspec knows, such as s3://") from None


def _remote(url: str) -> list[Input]:
    files, path = filesystem(url)
    scheme = url.split("://", 1)[0].lower()
    web = scheme in ("http", "https")

    def named(found: str) -> str:
        return found if is_url(found) else f"{scheme}://{found.lstrip('/') if scheme != 'file' else found}"

    try:
        if not web and _MAGIC.search(path):
            paths = sorted(files.glob(path))
        elif not web and files.isdir(path):
            paths = sorted(p for p in files.find(path) if _is_text(p))
        else:
            paths = [path]
        if not paths:
            raise UserError(f"{url} matches no text: give files or folders of text")
        infos = [(p, files.info(p)) for p in paths]
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url} does not exist: give files or folders of text") from None
    except Exception as error:  # each store has errors of its own
        raise unreachable(url, error) from None
    return [_input(url if p == path else named(p), p.split("?")[0], i.get("size"), _mtime(i)) for p, i in infos]


def _mtime(info: dict[str, Any]) -> int | None:
    changed: Any = info.get("LastModified") or info.get("mtime")
    seconds = changed.timestamp() if hasattr(changed, "timestamp") else changed
    return int(seconds * 1e9) if isinstance(seconds, int | float) else None


def unreachable(url: str, error: BaseException) -> UserError:
    """The error of a store that does not answer as it should."""
    text = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{url} cannot be read ({text[:300]}): check the address, the network and your rights there")


def open_input(item: Input) -> Any:
    """The raw file of an input; the caller closes it."""
    if item.name == "-":
        return sys.stdin.buffer
    if is_url(item.name):
        files, path = filesystem(item.name)
        try:
            return files.open(path, "rb", block_size=1 << 23)
        except Exception as error:
            raise unreachable(item.name, error) from None
    try:
        return open(item.name, "rb")
    except OSError as error:
        raise UserError(f"{item.name} cannot be read ({error.strerror})") from None
