"""What a checkpoint directory looks like, and how to tell a whole one from a damaged one.

    checkpoints/latest                    text: name of the newest whole checkpoint
    checkpoints/step-00000200/            .metadata, *.distcp, state.json, manifest.json
    checkpoints/.writing-step-00000300/   being written, by whoever holds its flock
    checkpoints/.replaced-step-00000200/  set aside while a new one of the same step takes its place
    checkpoints/.deleting-step-00000100/  being deleted

manifest.json is written last and gives size and SHA-256 of every other file, so a directory is
whole exactly when it has a manifest that its files agree with. (docs/contracts.md, section 4)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"
WRITING, DELETING, REPLACED = ".writing-", ".deleting-", ".replaced-"

_STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about one file: bytes and SHA-256 in hexadecimal."""

    size: int
    sha256: str


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a directory name says, None if it is not a checkpoint's name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def surplus(steps: Iterable[int], newest: int, keep_last: int | None, keep_every: int | None) -> list[int]:
    """The steps whose checkpoints are not to be kept beside the one of `newest`, which is.

    Args:
        steps: of all whole checkpoints.
        newest: of the one just written.
        keep_last: how many are kept, that one included; None: all.
        keep_every: multiples of it are kept whatever `keep_last` says.
    """
    if keep_last is None:
        return []
    older = sorted({step for step in steps if step != newest}, reverse=True)
    return [step for step in older[keep_last - 1 :] if keep_every is None or step % keep_every]


def manifest_text(files: Mapping[str, FileRecord]) -> str:
    """The manifest of these files."""
    listed = {name: {"size": record.size, "sha256": record.sha256} for name, record in sorted(files.items())}
    return json.dumps({"version": VERSION, "files": listed}, indent=1) + "\n"


def verify_checkpoint(path: Path) -> list[str]:
    """Compare a checkpoint directory with its manifest, reading every byte.

    Returns:
        One line for each problem, beginning with the path of the file concerned: missing, of another
        size, of other content, or not in the manifest. Empty when the checkpoint is whole.
    """
    problems, files = read_manifest(path)
    extra = [] if problems else sorted({f.name for f in path.iterdir()} - set(files) - {MANIFEST})
    return problems + damage(path, files) + [f"{path / name}: is not in the manifest" for name in extra]


def damage(path: Path, files: Mapping[str, FileRecord], hashes: bool = True) -> list[str]:
    """Which files of the manifest are missing or changed; without `hashes` only sizes are compared."""
    problems = []
    for name, record in files.items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != record.size:
                problems.append(f"{file}: has {size} bytes, the manifest says {record.size}")
            elif hashes and digest(file) != record.sha256:
                problems.append(f"{file}: its content is not what was written (SHA-256 differs)")
        except FileNotFoundError:
            problems.append(f"{file}: is missing")
        except OSError as error:
            problems.append(f"{file}: cannot be read ({error.strerror})")
    return problems


def problems_of(path: Path, hashes: bool = True) -> list[str]:
    """Why a directory cannot be used as a checkpoint. A stray file that somebody put there does no harm."""
    problems, files = read_manifest(path)
    return problems + damage(path, files, hashes)


def read_manifest(path: Path) -> tuple[list[str], dict[str, FileRecord]]:
    """Problems with the manifest itself, and what it says."""
    file = path / MANIFEST
    try:
        content: Any = json.loads(file.read_bytes())
        version = content["version"]
        if version != VERSION:
            return [f"{file}: format version {version!r}, this release reads {VERSION}"], {}
        files = {str(n): FileRecord(int(r["size"]), str(r["sha256"])) for n, r in content["files"].items()}
    except FileNotFoundError:
        return [f"{file}: is missing, so the checkpoint was never finished"], {}
    except OSError as error:
        return [f"{file}: cannot be read ({error.strerror})"], {}
    except (ValueError, LookupError, TypeError, AttributeError):
        return [f"{file}: is damaged"], {}
    if any("/" in name or name in ("", ".", "..") for name in files) or STATE not in files:
        return [f"{file}: is damaged"], {}
    return [], files


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256", _bufsize=1 << 22).hexdigest()


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes) -> FileRecord:
    """Write a small file under a temporary name, fsync, rename; its directory is the caller's to sync."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())
