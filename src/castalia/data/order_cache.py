"""Arrays that every process of a machine needs alike: made once, then shared by memory map.

    key ──hash──> FOLDER/NAME/ there? ──yes──> mapped read-only: one copy in memory for all ranks
                              └──no──> one process makes it (flock), the others wait for it

The folder is `castalia/orders` in XDG_CACHE_HOME, or in ~/.cache. An entry is written under
a temporary name and renamed when whole. Where the folder cannot be written, each process keeps
arrays of its own: slower, never wrong. What nobody used for a month is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_KEPT_SECONDS = 30 * 86400
Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """Where orders are kept, by the XDG Base Directory Specification."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "castalia" / "orders"


def shared_arrays(key: Mapping[str, Any], make: Callable[[], Arrays], folder: Path | None = None) -> Arrays:
    """The arrays that belong to a key, from the cache if they are there, else made and put there.

    Args:
        key: everything that the arrays depend on, as plain data.
        make: makes them.
        folder: the cache; None: `cache_folder()`.
    """
    import fcntl

    text = json.dumps(key, sort_keys=True)
    made: Arrays | None = None
    try:
        folder = cache_folder() if folder is None else folder
        entry = folder / hashlib.sha256(text.encode()).hexdigest()[:40]
        if (found := _load(entry, text)) is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{entry.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (found := _load(entry, text)) is not None:  # made while we waited
                return found
            made = make()
            _remove_unused(folder)
            _save(entry, text, made)
        return _load(entry, text) or made
    except (OSError, RuntimeError):  # a read-only or full disk, no home, no locks: this process for itself
        return make() if made is None else made


def _load(entry: Path, text: str) -> Arrays | None:
    """Map an entry; None where it is not there or not what the key says."""
    try:
        description = json.loads((entry / "key.json").read_text(encoding="utf-8"))
        if description["key"] != text:
            return None
        files = {name: entry / f"{name}.npy" for name in description["arrays"]}
        if any(_checksum(files[name]) != checksum for name, checksum in description["arrays"].items()):
            return None
        arrays = {name: np.load(file, mmap_mode="r") for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # it was used
    return {name: np.asarray(array) for name, array in arrays.items()}


def _save(entry: Path, text: str, arrays: Arrays) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=entry.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        checksums = {name: _checksum(temporary / f"{name}.npy") for name in arrays}
        (temporary / "key.json").write_text(json.dumps({"key": text, "arrays": checksums}), encoding="utf-8")
        if entry.exists():  # damaged, else it had been loaded
            shutil.rmtree(entry)
        os.replace(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checksum(path: Path) -> int:
    """CRC-32 of a file: a crash of the machine may leave it half there, and so nothing has to wait for the disk."""
    checksum = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - _KEPT_SECONDS
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
